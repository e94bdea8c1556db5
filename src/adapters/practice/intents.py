"""What kind of message a person has written."""

import re
from enum import Enum, auto

from adapters.practice.language import plain_words


class Intent(Enum):
    """The kinds of messages that get an answer of their own. Everything else is TALK."""

    TALK = auto()
    LIST_GOALS = auto()
    HUMAN = auto()
    PROFESSION = auto()
    WHO = auto()
    ABILITIES = auto()
    PRIVACY = auto()
    ADVICE = auto()
    REPEAT = auto()
    ANNOYED = auto()
    RESTART = auto()
    GREETING = auto()
    THANKS = auto()
    GOODBYE = auto()
    NUDGE = auto()
    UNSURE = auto()
    YES = auto()
    NO = auto()
    NOTHING = auto()
    WORDLESS = auto()


# Tried in order on the plain words of a short message.
_WHOLE: tuple[tuple[Intent, str], ...] = (
    (
        Intent.NUDGE,
        (
            r"(hello|hey|hi)? ?(are you|you) (still )?there|continue|go on|go ahead|try again|again|and|so|next|"
            r"resume|please (continue|go on|try again)|what happened|you (stopped|broke off|disappeared)|where "
            r"were we|im back"
        ),
    ),
    (
        Intent.GREETING,
        (
            r"(hi|hello|hey|hiya|howdy|yo|greetings|good (morning|afternoon|evening|day)|hallo)( (hi|hello|hey|"
            r"there|coach|again|vida|everyone|how are you|how are you doing|whats up))*|how are you|sup|whats "
            r"up|test|testing|ping|start|begin|lets (start|begin|go)|im ready"
        ),
    ),
    (
        Intent.THANKS,
        (
            r"(ok |okay |great |cool |good |perfect |awesome )*(thanks|thank you|thx|ty|cheers|many thanks|"
            r"thank u)( (so much|very much|a lot|you|coach|for (that|this|your help|the help|listening|"
            r"everything)|that helps|that helped|this helps|this helped|this was helpful|that was helpful))*"
        ),
    ),
    (
        Intent.GOODBYE,
        (
            r"(ok |okay |thanks |thank you |great )*(bye|goodbye|bye bye|good bye|see you|see ya|cya|good night|"
            r"goodnight|take care|talk (to you )?(later|soon)|i have to go|i need to go|i must go|gotta go|got "
            r"to go|quit|exit|lets stop( here| for today| now)?|im done( for today| for now| here)?|thats all( "
            r"for today| for now)?|thats it for (today|now)|until (next time|tomorrow)|see you (later|soon|"
            r"tomorrow|next (week|time)))( (bye|thanks|thank you|coach|later|soon|tomorrow|now|then))*"
        ),
    ),
    (
        Intent.UNSURE,
        (
            r"(hm+ |um+ |uh+ |well |honestly |sorry |no |i guess )*(idk|i dont know|dont know|dunno|i dunno|not "
            r"sure|im not sure|i am not sure|unsure|no idea|i have no idea|i do not know|no clue|i have no clue|"
            r"hm+|um+|i cant (say|tell)|hard to say|difficult to say|good question|maybe|perhaps|it depends|i "
            r"cant think of (anything|any|one)|who knows|let me think|im stuck|not really sure|cant decide|i "
            r"cant decide)( (really|yet|honestly|right now|at the moment|about that|to be honest|tbh|sorry|how|"
            r"what|maybe))*"
        ),
    ),
    (
        Intent.NOTHING,
        (
            r"(no )?(nothing|none|nope nothing|nothing (really|else|so far|yet|comes to mind)|nothing at all|"
            r"not much|thats (it|all)|no thats (it|all)|no more|not really|nobody|no one|nowhere|never|no "
            r"nothing( else)?|i havent tried anything( yet)?|i have not tried anything( yet)?)( (really|thanks|"
            r"thank you|sorry|i think|i guess))*"
        ),
    ),
    (
        Intent.YES,
        (
            r"(yes|yeah|yep|yup|ya|sure|ok|okay|k|kk|of course|absolutely|definitely|right|correct|exactly|true|"
            r"fine|good|great|cool|alright|all right|i do|i am|i think so|yes please|please|i guess( so)?|"
            r"sounds good|perfect|agreed|indeed|got it|i see|makes sense|nice|interesting)( (yes|yeah|sure|ok|"
            r"okay|please|i do|i am|it is|of course|good|great|right|i think so))*"
        ),
    ),
    (
        Intent.NO,
        (
            r"(no|nope|nah|not at all|no way|no thanks|no thank you|i dont|i dont think so|i do not)( (no|sorry|"
            r"thanks|thank you|really))*"
        ),
    ),
)

_WITHIN: tuple[tuple[Intent, str], ...] = (
    (
        Intent.LIST_GOALS,
        (
            r"\b(list|show|see|tell|read|view|display|remember|recall)\b.*\bmy (saved |current |old |other "
            r")*goals?\b|\bwhat (are|were|is|was) my (saved |current |old |last )*goals?\b|^my goals( please)?$|"
            r"^(list|show|view)( all)? goals$|\b(which|what) goals (do|did|have) i\b|^list_?goals$|\bdo i have "
            r"(any )?goals\b"
        ),
    ),
    (
        Intent.HUMAN,
        (
            r"\b(are|r) (you|u) (really |actually |just |even |like |still )*(an? |the )?(real |actual |living |"
            r"chat)?(human|person|real|robot|bot|chatbot|ai|machine|computer|program|chatgpt|gpt|llm|model|"
            r"alive|openai|claude)\b|\b(am i|is this|are we) (really |actually )?(talking|speaking|chatting|"
            r"writing)? ?(to |with )?(an? |the )?(real )?(human|person|bot|robot|machine|ai|computer|chatbot|"
            r"program)\b|\b(human|person) or (a )?(bot|machine|robot|ai)\b"
        ),
    ),
    (
        Intent.PROFESSION,
        (
            r"\bare you (a |an )?(really |real |actual |licensed |qualified |trained |certified )*(therapist|"
            r"psychologist|psychiatrist|doctor|lawyer|counsell?or|nurse|coach|expert|qualified|certified|"
            r"licensed)\b"
        ),
    ),
    (
        Intent.WHO,
        (
            r"\b(who|what) (exactly )?(are|r) (you|u)\b(?! (doing|saying|asking|talking))|\bwhats your name\b|"
            r"\bwhat is your name\b|\b(tell me|something) about yourself\b|\bintroduce yourself\b"
        ),
    ),
    (
        Intent.ABILITIES,
        (
            r"^(please )?help( me)?( please)?$|\bwhat (can|do|could) you (do|offer|help)\b|\bhow (does|do) "
            r"(this|it|you) work\b|\bhow can you help\b|^can you help( me)?$|\bwhat is (this|grow)\b|\bwhat can "
            r"i (ask|do|say|write)( here| you)?\b|\bwhat is coaching\b|\bhow (can|do|should) (i|we) (start|"
            r"begin|use)\b"
        ),
    ),
    (
        Intent.PRIVACY,
        (
            r"\bis (this|it|our (chat|conversation|talk)) (private|confidential|anonymous|recorded|stored|saved|"
            r"secure|safe)\b|\bwho (can|could|will|else can) (read|see)\b|\b(do|will|are) you (store|storing|"
            r"save|saving|record|recording|share|sharing|keep|remember)\b|\bwhere (is|does) (this|my data)\b|"
            r"\bdo you remember\b"
        ),
    ),
    (
        Intent.REPEAT,
        (
            r"\b(repeat|rephrase|reword) (the|that|your|this)?\b|\bwhat was (the|your) question\b|\b(i )?dont "
            r"(understand|get) (the|your|that|this|what)\b|^i dont (understand|get it)$|\bwhat do you mean\b|"
            r"^(sorry )?what$|^huh$|^pardon$|\byou (already|just) asked\b|\bdifferent question\b|\bcan you ask "
            r"(it|that|me) (differently|something else)\b|^(i )?(skip|pass|next question)$"
        ),
    ),
    (
        Intent.ANNOYED,
        (
            r"\b(this|that|it) is (stupid|useless|pointless|dumb|annoying|ridiculous|a waste of time|not "
            r"helpful|not helping|unhelpful)\b|\bthis (isnt|doesnt) (helping|help|helpful)\b|\byou(re| are) "
            r"(not (helping|helpful|listening)|useless|stupid|annoying|dumb|no help|repeating)\b|\bstop "
            r"asking\b|\btoo many questions\b|\bso many questions\b|^(shut up|stop|stop it|fuck you|fuck off|"
            r"wtf)$|\byou dont (understand|get it|listen)\b"
        ),
    ),
    (
        Intent.RESTART,
        (
            r"^(lets )?(start|begin) (over|again|anew|from scratch)\b|^(restart|reset|new (goal|topic|"
            r"subject))\b|\b(can|could) we (start over|talk about something (else|different)|change the "
            r"(subject|topic))\b|\blets talk about something (else|different)\b|\b(another|a different|a new) "
            r"(topic|goal|subject)( please)?$|^something else( please)?$|\bchange (the )?(topic|subject)\b"
        ),
    ),
    (
        Intent.ADVICE,
        (
            r"\bwhat (should|shall|can|could|would|must) i (do|say|try)\b|\bwhat would you (do|say|advise|"
            r"suggest|recommend)\b|\bwhat do you (think|suggest|recommend|advise)\b|\bdo you think i\b|\bshould "
            r"i\b|\b(give|tell|offer) me (some |an? |your |any )?(advice|ideas?|tips?|opinion|suggestions?|"
            r"answer|solution|options|what to do|examples?)\b|\bany (ideas?|advice|tips?|suggestions?|"
            r"thoughts)\b|\b(can|could|would) you (just |please )*(suggest|recommend|advise|tell me what|give "
            r"me|help me decide)\b|\byour (opinion|advice)\b|^what now$|^how$"
        ),
    ),
)

_WHOLE_PATTERNS = tuple((intent, re.compile(pattern)) for intent, pattern in _WHOLE)
_WITHIN_PATTERNS = tuple((intent, re.compile(pattern)) for intent, pattern in _WITHIN)

_SHORT = 16
"""Words; in a longer message a question to the coach is not the point."""
_NODS = frozenset("\U0001f44d\U0001f44c\u2705\U0001f64f\u2764\U0001f60a\U0001f642\U0001f600\U0001f4af")


def intent_of(text: str) -> Intent:
    """What kind of message this is."""
    words = plain_words(text[:1000])
    if not words:
        return Intent.YES if _NODS.intersection(text) else Intent.WORDLESS
    if len(words) > _SHORT:
        return Intent.TALK
    plain = " ".join(words)
    for intent, pattern in _WHOLE_PATTERNS:
        if pattern.fullmatch(plain):
            return intent
    for intent, pattern in _WITHIN_PATTERNS:
        if pattern.search(plain):
            return intent
    return Intent.TALK


_TIME = re.compile(
    r"\b(today|tonight|tomorrow|now|immediately|straight away|right away|(this|next|every|each|coming|"
    r"in the) (morning|afternoon|evening|week|weekend|month|day|night|lunch|monday|tuesday|wednesday|"
    r"thursday|friday|saturday|sunday|sprint|break)|(mon|tues|wednes|thurs|fri|satur|sun)days?|"
    r"weekends?|daily|weekly|morning|evening|noon|lunchtime|afternoon|tonight|january|february|march|"
    r"april|june|july|august|september|october|november|december|\d{1,2} ?(am|pm|oclock|uhr)|\d{4} "
    r"\d{2} \d{2}|(at|by|until|before|around|from) (\d|noon|lunch|seven|eight|nine|ten|six|five|four|"
    r"three|two|one|bed|breakfast|dinner|work|the end)\w*|after (work|lunch|dinner|breakfast|school|"
    r"the)|in (a|an|one|two|three|\d+) (minute|hour|day|week|month)s?|within (a|the|two|\d+)|once a|"
    r"twice a|end of|as soon as|first thing|(on the|the) \d{1,2}(st|nd|rd|th)|on (mon|tue|wed|thu|fri|"
    r"sat|sun)|when i)\b"
)
_RESOLVE = re.compile(r"\b(i will|ill|im going to|i am going to|i plan to|going to|i could|let me)\b")
_DONE = re.compile(
    r"\b(i did( it)?|did it|done|it worked|worked out|went (really |very |quite |pretty |so )?(well|"
    r"great|good|fine|better|ok|okay)|success\w*|managed|finished|completed|i (called|wrote|sent|talked|"
    r"spoke|asked|told|went|started|began|took|made|finally|kept|had the|have done|ran|walked|slept|"
    r"signed|applied))\b"
)
_NOT_DONE = re.compile(
    r"\b(didnt|did not|havent|have not|hasnt|forgot|couldnt|could not|no time|failed|not yet|never got|"
    r"wasnt able|not able|went (badly|wrong|terribly|bad|poorly)|not (so |very |really )?(well|good|"
    r"great)|too (busy|tired|scared)|didn|put it off|chickened|skipped|gave up)\b"
)
_SURE = re.compile(r"\b(very|really|pretty|quite|totally|absolutely|completely|fairly|100|certain|definitely)\b")
_DOUBTS = re.compile(r"\b(not|hardly|low|doubt|barely|little|unlikely|zero|dont think|half)\b")
_NUMBERS = {
    word: number
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}


def names_time(text: str) -> bool:
    """Whether a plan says when."""
    return bool(_TIME.search(" ".join(plain_words(text[:1000]))))


def resolves(text: str) -> bool:
    """Whether a person says what they will do."""
    return bool(_RESOLVE.search(" ".join(plain_words(text[:1000]))))


def outcome(text: str) -> bool | None:
    """Whether a step was taken (True) or not (False), as far as the person says."""
    plain = " ".join(plain_words(text[:1000]))
    if _NOT_DONE.search(plain):
        return False
    return True if _DONE.search(plain) else None


def confidence(text: str) -> int | None:
    """A number from 0 to 10, or what comes close to it in words. None if nothing does."""
    if match := re.search(r"(?<![\d.])(\d{1,3})\s*(%|percent)?", text[:1000]):
        number = int(match.group(1))
        if match.group(2) or 10 < number <= 100:
            return min(number, 100) // 10
        if number <= 10:
            return number
    plain = plain_words(text[:1000])
    for word in plain:
        if word in _NUMBERS:
            return _NUMBERS[word]
    said = " ".join(plain)
    if _DOUBTS.search(said):
        return 4
    return 8 if _SURE.search(said) else None


def count_options(text: str) -> int:
    """How many options an answer names, roughly."""
    parts = re.split(r"[,;\n]|\band\b|\bor\b|\bthen\b|(?:^|\s)\d[.)]\s", text[:1000], flags=re.IGNORECASE)
    return sum(1 for part in parts if plain_words(part))
