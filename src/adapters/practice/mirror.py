"""Gives a person's own words back: turned round to "you" where that is safe, in quotation marks where not."""

import re
from dataclasses import dataclass

MOST_WORDS = 18
"""A longer clause is cut where it pauses."""
QUOTED_WORDS = 12
"""A quotation is cut after so many."""
_QUOTED_CHARACTERS = 140
_READ = 1200
"""Characters of a message that are looked at; people say what matters early."""

_SENTENCE = re.compile(r"(?:[.!?\u2026;]+(?=\s|$)|\n+)")
_BUT = re.compile(r"(?:,\s*|\s+)(?:but|however|though|although)\s+", re.IGNORECASE)
_PAUSE = re.compile(
    (
        r",?\s+(?:because|since|so that|so|which|while|whereas|when|where|until|unless|if|even though)\s+|"
        r",\s+|\s+and\s+"
    ),
    re.IGNORECASE,
)
_NOT_SPEECH = re.compile(r"[^\w\s'\u2019,.:%/&+\-()\u20ac$\u00a3]")
_OPENING = re.compile(
    (
        r"^(?:(?:well|so|ok|okay|um+|uh+|hmm+|yes|yeah|yep|no|hi|hello|hey|honestly|actually|basically|"
        r"maybe|perhaps|i think|i guess|i suppose|i believe|i mean|also|and|but|just|probably|oh|right(?! "
        r"now)|sure|sorry|thanks|thank you)(?:(?:\s*,\s*|\s+)(?:that|there|coach))?(?:\s*,\s*|\s+|$))+"
    ),
    re.IGNORECASE,
)

_WANT = re.compile(
    (
        r"\b(?:(?:what )?i(?:\s+(?:really|just|also|still|only|finally|do|so|simply|"
        r"would))*(?:'d\s+(?:really\s+)?(?:like|love)|\s+(?:want|wish|hope|need|plan|aim|intend|would like|"
        r"would love|like|love))(?:\s+(?:is|now|most|more than anything))*|i'm (?:trying|hoping|planning|"
        r"looking|aiming)|i am (?:trying|hoping|planning|looking|aiming)|(?:my|the) goal (?:is|would be)|"
        r"(?:can you |please )*help me|i(?:'d| would) be glad)\s+(?P<to>to\s+)?(?P<what>.+)"
    ),
    re.IGNORECASE,
)
_VAGUE = frozenset(
    {"", "to", "it", "this", "that", "with this", "with that", "out", "you", "something", "more", "less", "know"}
    | {"help", "some help", "your help", "advice", "some advice", "your advice", "talk", "someone to talk to"}
)
_HABIT = re.compile(r"^i (?:really |just |also |still )*(?:like|love)\b", re.IGNORECASE)
_HOW = re.compile(r"\bhow (?:do|can|could|should|would|might) i\s+(?P<what>.+)", re.IGNORECASE)
_SHOULD = re.compile(r"\b(?:should|shall|can) i\s+(?P<what>.+)", re.IGNORECASE)
_WHETHER = re.compile(r"\b(?:decide|know|figure out|wondering|wonder) (?P<what>(?:whether|if) .+)", re.IGNORECASE)

_SAFE_START = re.compile(
    (
        r"^(?:i|i'm|i've|i'd|i'll|im|ive|we|we're|we've|we'll|he|he's|she|she's|they|they're|they've|it|"
        r"it's|there|there's|that's|nobody|everybody|everyone|no one|nothing|everything)\b"
    ),
    re.IGNORECASE,
)
_NOUN_START = re.compile(r"^(?:my|our|the|this|these|that|those|his|her|their)\b", re.IGNORECASE)
_VERB = re.compile(
    (
        r"\b(?:is|are|was|were|has|have|had|does|do|did|doesn't|don't|didn't|isn't|aren't|wasn't|can|can't|"
        r"could|couldn't|will|won't|would|should|keeps|makes|feels|seems|wants|needs|takes|gets|says|thinks|"
        r"gives|goes|ignores|works)\b|\w's\s(?:a|the|so|too|not|very|always|never|\w+ing)\b"
    ),
    re.IGNORECASE,
)
# Where turning a clause round could make it wrong: someone else's "you", leftover verbs of the first person.
_RISKY = re.compile(
    r"\b(?:you|your|yours|yourself|u|id|ill|lets|let's)\b|\b(?:and|or|but|then|who|that) (?:was|am|'m)\b"
    r"|[\"\u201c\u201d:()/]",
    re.IGNORECASE,
)
_BETWEEN = r"((?:just|never|always|still|also|really|only|already|now|often|\w+ly)\s+)?"
_TURNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), turned)
    for pattern, turned in (
        (rf"\bi\s+{_BETWEEN}am\b", r"you \1are"),
        (rf"\bi\s+{_BETWEEN}was\b", r"you \1were"),
        (rf"\bi\s+{_BETWEEN}wasn't\b", r"you \1weren't"),
        (r"\bam i\b", "are you"),
        (r"\bwas i\b", "were you"),
        (r"\bi'?m\b", "you're"),
        (r"\bi'?ve\b", "you've"),
        (r"\b(?:i|we)'d\b", "you'd"),
        (r"\b(?:i|we)'ll\b", "you'll"),
        (r"\bwe're\b", "you're"),
        (r"\bwe've\b", "you've"),
        (r"\bam\b", "are"),
        (r"\b(?:myself)\b", "yourself"),
        (r"\bourselves\b", "yourselves"),
        (r"\b(?:my|our)\b", "your"),
        (r"\b(?:mine|ours)\b", "yours"),
        (r"\b(?:i|me|we|us)\b", "you"),
    )
)


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A clause of the person's, ready to be put into a sentence.

    `quoted` says that it is verbatim; else it speaks to the person and begins in lower case.
    """

    text: str
    quoted: bool


def tidy(text: str) -> str:
    """One line of ordinary characters: no emoji, no line breaks, straight apostrophes, single spaces."""
    text = text[:_READ].replace("\u2019", "'").replace("\u2018", "'").replace("\0", " ")
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def word_count(text: str) -> int:
    """Words with a letter or a digit in them."""
    return len(re.findall(r"\w[\w'\u2019-]*", text))


def key_clause(text: str) -> str:
    """The clause that is most worth giving back: what comes after a "but", what is said of oneself or felt."""
    best, best_score = "", -100.0
    for number, (clause, after_but) in enumerate(_clauses(text)):
        words = word_count(clause)
        if not words:
            continue
        score = float(min(words, 8))
        score -= max(0, words - MOST_WORDS) * 0.5
        score += 3 * bool(re.match(r"(?:i|i'm|i've|my|we|it's|im)\b", clause, re.IGNORECASE))
        score += 4 * bool(
            re.search(r"\b(?:feel|feeling|felt|want|need|wish|afraid|tired|stuck|hate|miss|hard)\b", clause)
        )
        score += 0.5 * number + 5 * after_but
        if score > best_score:
            best, best_score = clause, score
    return _shortened(best)


def wish(text: str) -> str:
    """What the person says that they want, as it would follow "You want": "to …" or a thing. Empty if nothing.

    In the person's own words, still about "me" and "my".
    """
    for clause, _ in _clauses(text, split_but=False):
        bare = _OPENING.sub("", clause)
        if match := _HOW.search(bare) or _SHOULD.search(bare):
            what = match.group("what").strip(" ,.")
            asked = bool(_SHOULD.search(bare)) and not _HOW.search(bare)
            if word_count(what) >= (2 if asked else 1) and not what.lower().startswith(("do", "say")):
                return f"to decide whether to {what}" if asked else f"to {what}"
        if (match := _WANT.search(bare)) and not _HABIT.match(match.group(0)):
            what = match.group("what").strip(" ,.")
            helping = "help me" in match.group(0).lower()[:20]
            verb = match.group(0).lower()
            if not match.group("to") and re.search(
                r"\b(?:trying|hoping|planning|looking|aiming|be glad)\b", verb[:30]
            ):
                continue
            to = bool(match.group("to")) or helping
            if what.lower().startswith("to "):
                what = what[3:]
                to = True
            if what.lower() not in _VAGUE and not what.lower().startswith("you "):
                return f"to {what}" if to else what
        if match := _WHETHER.search(bare):
            return f"to decide {match.group('what').strip(' ,.')}"
    return ""


def turned(clause: str) -> str | None:
    """The clause said to the person, or None where turning it round might garble it."""
    if _RISKY.search(clause) or not clause:
        return None
    for pattern, replacement in _TURNS:
        clause = pattern.sub(replacement, clause)
    return re.sub(r"\s+", " ", clause)


def mirrored(text: str) -> Mirrored:
    """The key clause of a message, turned round or quoted. Empty text where there are no words."""
    clause = key_clause(text)
    safe = _SAFE_START.match(clause) or (_NOUN_START.match(clause) and _VERB.search(clause))
    if safe and word_count(clause) >= 3 and (said := turned(clause)):
        return Mirrored(said[0].lower() + said[1:], quoted=False)
    return Mirrored(quotation(clause), quoted=True)


def wanting(what: str) -> Mirrored:
    """A wish, as it would follow "You want"."""
    short = _shortened(what)
    said = turned(short)
    return Mirrored(said, quoted=False) if said else Mirrored(quotation(short), quoted=True)


def quotation(text: str, most: int = QUOTED_WORDS) -> str:
    """The beginning of a text in quotation marks, free of marks that would end the sentence early."""
    words = _NOT_SPEECH.sub(" ", text).split()
    if not any(map(word_count, words)):
        return ""
    whole = " ".join(words)
    kept = " ".join(words[:most])[:_QUOTED_CHARACTERS].strip(" ,.:-")
    rest = "\u2026" if len(kept) < len(whole.strip(" ,.:-")) else ""
    return f"\u201c{kept}{rest}\u201d"


def _clauses(text: str, *, split_but: bool = True) -> list[tuple[str, bool]]:
    """The clauses of a text without its fillers, and whether each comes after a "but"."""
    clauses = []
    for sentence in _SENTENCE.split(text[:_READ].replace("\u2019", "'").replace("\u2018", "'")):
        for number, part in enumerate(_BUT.split(sentence) if split_but else [sentence]):
            clean = " ".join(_NOT_SPEECH.sub(" ", part).split())
            bare = _OPENING.sub("", clean) if word_count(clean) > 3 else clean
            clauses.append(((bare or clean).strip(" ,.:-"), number > 0))
    return clauses


def _shortened(clause: str) -> str:
    """A clause cut at a pause, so that it stays within MOST_WORDS."""
    if word_count(clause) <= MOST_WORDS:
        return clause
    ends = [
        match.start()
        for match in _PAUSE.finditer(clause)
        if 4 <= word_count(clause[: match.start()]) <= MOST_WORDS
    ]
    return clause[: ends[-1]] if ends else " ".join(clause.split()[:QUOTED_WORDS]) + "\u2026"
