"""The conversation: what the coach says next, and where it then stands.

Nothing is remembered between turns. Whoever wants to go on replays the transcript, and comes to the same place.
"""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from adapters.practice import sentences
from adapters.practice.crisis import AFTERWARDS, HELP, detect
from adapters.practice.intents import (
    Intent,
    confidence,
    count_options,
    intent_of,
    names_time,
    outcome,
    resolves,
)
from adapters.practice.language import Language, guess_language, plain_words
from adapters.practice.mirror import mirrored, quotation, tidy, wanting, wish, word_count
from adapters.practice.questions import SMALLER, questions
from adapters.practice.signposts import HELP_FIRST, signpost
from adapters.practice.steps import Step
from core.model.agent import Domain
from core.model.goal import MAX_GOAL
from core.model.message import ToolExchange

SET_GOAL = "set_goal"
LIST_GOALS = "list_goals"

_SURE_ENOUGH = 7
_PATIENCE = 2
"""How often in a row the coach asks again before it goes on without an answer."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the coach needs before it can answer."""

    name: str
    arguments: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PastTurn:
    """A turn of the transcript. `reply` is None where none was stored, `partial` where it broke off.

    `unseen` says that the person sent pictures or files too.
    """

    said: str
    reply: str | None
    partial: bool
    exchanges: tuple[ToolExchange, ...] = ()
    unseen: bool = False


@dataclass(slots=True)
class Conversation:
    """Where a conversation stands."""

    thread_id: str
    domain: Domain
    awaiting: Step = Step.OPENING
    introduced: bool = False
    after_crisis: Language | None = None
    goal: str = ""
    commitment: str = ""
    saved: str = ""
    options: int = 0
    doubts: int = 0
    probed: bool = False
    unheard: str = ""
    """What the person said last, if the coach's answer to it never arrived."""
    used: dict[str, int] = field(default_factory=dict)
    pointed: frozenset[str] = frozenset()

    def replay(self, turn: PastTurn) -> None:
        """Goes through a past turn.

        Where the reply did not arrive the person has not seen the next question, so the conversation stays
        where it was; only the wording moves on.
        """
        exchange = next((each for each in turn.exchanges if each.name == SET_GOAL), None)
        ahead = copy(self)
        ahead.used = dict(self.used)
        full = ahead.answer(turn.said, (), exchange, unseen=turn.unseen)
        # A question is what a reply ends with: if it is there, the person has read all that matters.
        arrived = turn.reply is not None and (not turn.partial or "?" in turn.reply or "?" not in full)
        if turn.reply is not None and turn.partial and len(turn.reply) * 2 < len(full):
            arrived = False
        if arrived:
            for name in self.__slots__:
                setattr(self, name, getattr(ahead, name))
        else:
            self.used = ahead.used
            self.introduced = self.introduced or sentences.INTRODUCTION[self.domain] in (turn.reply or "")
            language = detect(turn.said)
            self.after_crisis = language or self.after_crisis
            self.unheard = "" if language else turn.said
        if exchange is not None and not exchange.is_error:
            self.saved = _argument(exchange.arguments_json, "commitment")

    def call_for(self, said: str, offered: Collection[str]) -> ToolCall | None:
        """The tool that the answer to `said` needs, if it is offered. Leaves the conversation as it is."""
        ahead = copy(self)
        ahead.used = dict(self.used)
        wanted: list[ToolCall] = []
        ahead.answer(said, offered, None, wanted)
        return wanted[0] if wanted else None

    def answer(
        self,
        said: str,
        offered: Collection[str],
        exchange: ToolExchange | None,
        wanted: list[ToolCall] | None = None,
        *,
        unseen: bool = False,
    ) -> str:
        """Answers, and moves on.

        `offered` names the tools that may be called, `exchange` holds the answer of the one that was, and
        `wanted` takes the call that is needed. `unseen` says that there were pictures or files beside the words.
        """
        said = said.encode("utf-8", "ignore").decode().replace("\0", " ")
        language = detect(said)
        if language is not None:
            self.after_crisis = language
            self.unheard = ""
            return HELP[language]
        lead = [AFTERWARDS[self.after_crisis]] if self.after_crisis is not None else []
        returning = self.after_crisis is not None
        self.after_crisis = None
        unheard, self.unheard = self.unheard, ""
        intent = intent_of(said)
        if unheard and intent in {Intent.NUDGE, Intent.GREETING, Intent.WORDLESS}:
            said, intent = unheard, intent_of(unheard)
        blind = [sentences.CANT_SEE] if unseen else []
        language = guess_language(said)
        if language is not Language.ENGLISH and intent is Intent.TALK:
            self.introduced = True
            return " ".join([*lead, *blind, sentences.ENGLISH_ONLY.get(language, sentences.ENGLISH_ONLY[None])])
        reply = _Reply(self, said, intent, frozenset(offered), exchange, wanted if wanted is not None else [])
        if returning and not reply.keeps_its_meaning_after_crisis():
            gently = sentences.GENTLY_BEGIN if self.awaiting is Step.OPENING else sentences.GENTLY
            body = [self.pick("gently", gently), self.again()]
        elif unseen and intent is Intent.WORDLESS:
            body = [self.again()]
        else:
            body = reply.sentences()
        if not self.introduced:
            self.introduced = True
            if intent not in {Intent.WHO, Intent.HUMAN, Intent.ABILITIES}:
                lead.append(("" if lead else sentences.HELLO) + sentences.INTRODUCTION[self.domain])
        return " ".join([*lead, *blind, *filter(None, body)])

    def pick(self, bank: str, choices: Sequence[str]) -> str:
        """The next sentence of a bank: threads begin at different ones, and none comes twice before all have."""
        count = self.used.get(bank, 0)
        self.used[bank] = count + 1
        start = zlib.crc32(f"{self.thread_id}/{bank}".encode("utf-8", "replace"))
        return choices[(start + count) % len(choices)]

    def in_order(self, bank: str, choices: Sequence[str]) -> str:
        """The next sentence of a bank that begins with the fullest one."""
        count = self.used.get(bank, 0)
        self.used[bank] = count + 1
        return choices[count % len(choices)]

    def ask(self, step: Step) -> str:
        """The next question of a step; the person's next words answer it."""
        self.awaiting = step
        self.doubts = 0
        return self.pick(step, questions(self.domain, step))

    def ask_smaller(self) -> str:
        """An easier way into the same step."""
        smaller = SMALLER.get(self.awaiting)
        if smaller is None:
            return self.again()
        return self.pick(f"smaller/{self.awaiting}", smaller)

    def again(self, *, recall: bool = True) -> str:
        """The question where the conversation stands, in other words. `recall` names the step that was planned."""
        if self.awaiting is Step.OPENING:
            return self.ask(Step.GOAL)
        if self.awaiting is Step.CHECK_IN and not self.commitment:
            return self.pick("next", sentences.NEXT)
        question = self.pick(self.awaiting, questions(self.domain, self.awaiting))
        if self.awaiting is Step.CHECK_IN and recall:
            return f"Your next step was {quotation(self.commitment, 25)}. {question}"
        return question

    def new_round(self) -> None:
        """Leaves the goal behind."""
        self.goal = self.commitment = self.saved = ""
        self.options = self.doubts = 0
        self.probed = False


class _Reply:
    """One reply in the making."""

    def __init__(
        self,
        talk: Conversation,
        said: str,
        intent: Intent,
        offered: frozenset[str],
        exchange: ToolExchange | None,
        wanted: list[ToolCall],
    ) -> None:
        self._talk = talk
        self._said = said
        self._intent = intent
        self._offered = offered
        self._exchange = exchange
        self._wanted = wanted
        self._wish = wish(said) if intent in {Intent.TALK, Intent.ADVICE, Intent.RESTART} else ""

    def keeps_its_meaning_after_crisis(self) -> bool:
        """Whether the message is clear in itself, and not about what was said on the crisis."""
        if self._intent is Intent.TALK:
            return bool(self._wish) and self._talk.awaiting in {Step.OPENING, Step.GOAL}
        return self._intent in {
            Intent.LIST_GOALS,
            Intent.HUMAN,
            Intent.PROFESSION,
            Intent.WHO,
            Intent.ABILITIES,
            Intent.PRIVACY,
            Intent.RESTART,
            Intent.GOODBYE,
        }

    def sentences(self) -> list[str]:
        """What to say, in order; a question comes last."""
        talk = self._talk
        match self._intent:
            case Intent.LIST_GOALS:
                return [self._goals(), talk.again(recall=False)]
            case Intent.HUMAN | Intent.PROFESSION | Intent.WHO | Intent.ABILITIES | Intent.PRIVACY:
                return [talk.in_order(self._intent.name, sentences.ABOUT[self._intent]), talk.again()]
            case Intent.GREETING:
                return [*self._greeting(), talk.again()]
            case Intent.THANKS:
                return self._thanks()
            case Intent.GOODBYE:
                return self._goodbye()
            case Intent.NUDGE | Intent.REPEAT:
                return [talk.pick("again", sentences.AGAIN), talk.again()]
            case Intent.WORDLESS:
                return [talk.pick("wordless", sentences.WORDLESS), talk.again()]
            case Intent.ANNOYED:
                return [talk.pick("annoyed", sentences.ANNOYED), talk.ask_smaller()]
            case Intent.RESTART:
                talk.new_round()
                if self._wish and _names_a_topic(self._wish):
                    return self._set_out(self._wish)
                return [talk.pick("afresh", sentences.AFRESH), talk.ask(Step.GOAL)]
            case Intent.ADVICE if not (self._wish and talk.awaiting in {Step.OPENING, Step.GOAL, Step.CHECK_IN}):
                if talk.awaiting is Step.OPENING:
                    return [talk.in_order("advice", sentences.ADVICE), talk.ask(Step.GOAL)]
                return [talk.in_order("advice", sentences.ADVICE), talk.ask_smaller()]
            case Intent.UNSURE | Intent.YES | Intent.NO | Intent.NOTHING:
                return self._short()
            case _:
                return self._talked()

    # What is not an answer to the question.

    def _greeting(self) -> list[str]:
        talk = self._talk
        if talk.awaiting is Step.OPENING:
            return []
        return [talk.pick("hello", sentences.HELLO_AGAIN)]

    def _thanks(self) -> list[str]:
        talk = self._talk
        welcome = talk.pick("welcome", sentences.WELCOME)
        if talk.awaiting is Step.TAKEAWAY:
            talk.awaiting = Step.CHECK_IN
        if talk.awaiting is Step.CHECK_IN:
            return [welcome, self._farewell()]
        return [welcome, talk.again()]

    def _goodbye(self) -> list[str]:
        talk = self._talk
        if talk.awaiting is Step.TAKEAWAY:
            talk.awaiting = Step.CHECK_IN
        if talk.awaiting is Step.CHECK_IN:
            return [talk.pick("bye", sentences.BYE), self._farewell()]
        return [talk.pick("bye", sentences.BYE), talk.pick("place", sentences.KEEP_PLACE)]

    def _farewell(self) -> str:
        return self._talk.pick("farewell", sentences.FAREWELL)

    def _goals(self) -> str:
        talk = self._talk
        if self._exchange is not None and self._exchange.name == LIST_GOALS:
            return sentences.NOT_READ if self._exchange.is_error else _listed(self._exchange.output)
        if LIST_GOALS in self._offered:
            self._wanted.append(ToolCall(LIST_GOALS, {}))
        if talk.goal:
            return (
                f"I can't look up saved goals here, but in this talk you set out to work on {_quoted(talk.goal)}."
            )
        return "I can't look up saved goals here, and in this talk you have not named one yet."

    # Short answers.

    def _short(self) -> list[str]:
        talk, intent = self._talk, self._intent
        match talk.awaiting, intent:
            case (Step.OBSTACLE | Step.NOW, Intent.NO | Intent.NOTHING):
                return [talk.pick("nothing", sentences.NOTHING), *self._next_question()]
            case Step.MORE, _:
                return [talk.pick("enough", sentences.ENOUGH), *self._next_question()]
            case Step.CONFIDENCE, Intent.YES:
                return [talk.pick("sure", sentences.SURE), *self._closing()]
            case Step.CONFIDENCE, Intent.NO:
                return [talk.pick("honest", sentences.HONEST), talk.ask(Step.RAISE)]
            case Step.RAISE, _:
                return [talk.pick("as-it-is", sentences.AS_IT_IS), *self._closing()]
            case Step.TAKEAWAY, _:
                talk.awaiting = Step.CHECK_IN
                return [talk.pick("fine", sentences.FINE), self._farewell()]
            case (Step.CHECK_IN, Intent.NO | Intent.NOTHING):
                return [talk.pick("fine", sentences.FINE), self._farewell()]
            case Step.LEARNED, _:
                talk.new_round()
                talk.awaiting = Step.GOAL
                return [talk.pick("fine", sentences.FINE), talk.pick("next", sentences.NEXT)]
            case (Step.OPENING | Step.CHECK_IN, _):
                return [talk.pick("gladly", sentences.GLADLY), talk.again()]
        talk.doubts += 1
        if intent is Intent.YES:
            return [talk.pick("yes", sentences.YES), talk.again()]
        open_ended = talk.awaiting in {Step.GOAL, Step.STEP}
        if talk.doubts >= _PATIENCE and not open_ended:
            return [talk.pick("leave", sentences.LEAVE_OPEN), *self._next_question()]
        if talk.awaiting is Step.STEP and talk.doubts > _PATIENCE:
            talk.awaiting = Step.CHECK_IN
            return [talk.pick("no-step", sentences.NO_STEP), self._farewell()]
        lead = sentences.NO_IS_FINE if intent in {Intent.NO, Intent.NOTHING} else sentences.UNSURE
        return [talk.pick("unsure", lead), talk.ask_smaller()]

    def _next_question(self) -> list[str]:
        """Goes on to the next step without an answer."""
        talk = self._talk
        match talk.awaiting:
            case Step.SIGN:
                return [talk.ask(Step.NOW)]
            case Step.NOW:
                return [talk.ask(Step.OBSTACLE)]
            case Step.OBSTACLE:
                return [talk.pick("to-options", sentences.TO_OPTIONS), talk.ask(Step.OPTIONS)]
            case Step.MORE if talk.options > 1:
                return [talk.ask(Step.CHOICE)]
            case Step.WHEN:
                return self._committed("")
            case Step.CONFIDENCE:
                return self._closing()
            case _:
                return [talk.pick("to-step", sentences.TO_STEP), talk.ask(Step.STEP)]

    # Answers.

    def _talked(self) -> list[str]:
        """Goes on, with a signpost before the question if the message calls for one."""
        talk = self._talk
        found = signpost(self._said, talk.pointed)
        if found is None:
            return self._onward()
        kind, sentence = found
        talk.pointed |= {kind}
        if kind in HELP_FIRST and talk.awaiting in {Step.OPENING, Step.GOAL, Step.CHECK_IN}:
            talk.new_round()
            talk.awaiting = Step.GOAL
            talk.probed = True
            return [self._reflection(), sentence, talk.pick("help", sentences.TOWARDS_HELP)]
        said = self._onward()
        return [*said[:-1], sentence, said[-1]]

    def _onward(self) -> list[str]:
        talk = self._talk
        match talk.awaiting:
            case Step.OPENING:
                if self._wish:
                    return self._set_out(self._wish)
                return [self._reflection(), talk.ask(Step.GOAL)]
            case Step.GOAL:
                return self._hear_goal()
            case Step.SIGN:
                return [self._reflection(), talk.pick("to-now", sentences.TO_NOW), talk.ask(Step.NOW)]
            case Step.NOW:
                return [self._reflection(), talk.ask(Step.OBSTACLE)]
            case Step.OBSTACLE:
                return [self._reflection(), talk.pick("to-options", sentences.TO_OPTIONS), talk.ask(Step.OPTIONS)]
            case Step.OPTIONS:
                talk.options = count_options(self._said)
                if talk.options > 1:
                    return [self._reflection("several"), talk.ask(Step.CHOICE)]
                return [self._reflection("option"), talk.ask(Step.MORE)]
            case Step.MORE:
                talk.options += count_options(self._said)
                return [self._reflection("option"), talk.ask(Step.CHOICE)]
            case Step.CHOICE:
                if resolves(self._said) and names_time(self._said):
                    return self._hear_step()
                return [
                    self._reflection("choice"),
                    talk.pick("to-step", sentences.TO_STEP),
                    talk.ask(Step.STEP),
                ]
            case Step.STEP:
                return self._hear_step()
            case Step.WHEN:
                return self._committed(tidy(self._said))
            case Step.CONFIDENCE:
                return self._hear_confidence()
            case Step.RAISE:
                return [self._reflection(), *self._closing()]
            case Step.TAKEAWAY:
                talk.awaiting = Step.CHECK_IN
                return [self._reflection("keep"), self._farewell()]
            case Step.CHECK_IN:
                return self._hear_news()
            case Step.LEARNED:
                reflection = self._reflection("keep")
                talk.new_round()
                talk.awaiting = Step.GOAL
                return [reflection, talk.pick("next", sentences.NEXT)]

    def _hear_goal(self) -> list[str]:
        talk = self._talk
        if self._wish:
            return self._set_out(self._wish)
        if not talk.probed:
            talk.probed = True
            if word_count(self._said) <= 2:
                return [f"{_quoted(self._said)}, then.", talk.pick("about-it", sentences.WHAT_ABOUT_IT)]
            if not mirrored(self._said).quoted:
                return [self._reflection(), talk.pick("instead", sentences.INSTEAD)]
        talk.goal = _bounded(tidy(self._said))
        return [self._reflection("goal"), talk.ask(Step.SIGN)]

    def _set_out(self, what: str) -> list[str]:
        talk = self._talk
        talk.goal = _bounded(what.removeprefix("to "))
        said = wanting(what)
        if said.quoted:
            return [_framed(talk.pick("want-quoted", sentences.WANT_QUOTED), said.text), talk.ask(Step.SIGN)]
        return [_framed(talk.pick("want", sentences.WANT), said.text), talk.ask(Step.SIGN)]

    def _hear_step(self) -> list[str]:
        talk = self._talk
        talk.commitment = _bounded(tidy(self._said))
        if names_time(self._said):
            return self._committed("")
        return [self._reflection("step"), talk.ask(Step.WHEN)]

    def _committed(self, when: str) -> list[str]:
        """The person has said what they will do, and here perhaps when."""
        talk = self._talk
        if when:
            talk.commitment = _bounded(f"{talk.commitment.rstrip(' .!')}, {when[:1].lower()}{when[1:]}")
        reflection = self._reflection("when" if when else "step")
        return [reflection, self._noted(), talk.ask(Step.CONFIDENCE)]

    def _noted(self) -> str:
        """Saves the goal where that can be done, and says truly whether it was."""
        talk = self._talk
        if talk.saved == talk.commitment:
            return talk.pick("saved", sentences.SAVED)
        if self._exchange is not None and self._exchange.name == SET_GOAL:
            if self._exchange.is_error:
                return talk.pick("not-saved", sentences.NOT_SAVED)
            talk.saved = talk.commitment
            return talk.pick("saved", sentences.SAVED)
        if SET_GOAL in self._offered:
            goal = talk.goal or talk.commitment
            self._wanted.append(ToolCall(SET_GOAL, {"goal": goal, "commitment": talk.commitment}))
        return ""

    def _hear_confidence(self) -> list[str]:
        talk = self._talk
        number = confidence(self._said)
        if number is None:
            return [self._reflection(), *self._closing()]
        given = f"{number} out of 10"
        if any(char.isdigit() for char in self._said) or str(number) in self._said:
            bank = sentences.NUMBER_HIGH if number >= _SURE_ENOUGH else sentences.NUMBER_LOW
            said = talk.pick("number", bank).format(given)
        else:
            said = talk.pick("sure", sentences.SURE if number >= _SURE_ENOUGH else sentences.HONEST)
        return [said, *(self._closing() if number >= _SURE_ENOUGH else [talk.ask(Step.RAISE)])]

    def _closing(self) -> list[str]:
        talk = self._talk
        parts = []
        if talk.goal:
            parts.append(f"your goal is {_quoted(talk.goal)}")
        if talk.commitment:
            parts.append(f"your next step is {_quoted(talk.commitment)}")
        summary = f"In your own words: {' and '.join(parts)}." if parts else ""
        return [summary, talk.ask(Step.TAKEAWAY)]

    def _hear_news(self) -> list[str]:
        talk = self._talk
        taken = outcome(self._said) if talk.commitment and not self._wish else None
        if taken is True:
            return [talk.pick("well-done", sentences.WELL_DONE), talk.ask(Step.LEARNED)]
        if taken is False:
            talk.saved = ""
            talk.awaiting = Step.OBSTACLE
            return [talk.pick("not-done", sentences.NOT_DONE), talk.pick("happened", sentences.WHAT_HAPPENED)]
        talk.new_round()
        if self._wish:
            return self._set_out(self._wish)
        return [self._reflection(), talk.ask(Step.GOAL)]

    # Wording.

    def _reflection(self, kind: str = "plain") -> str:
        """The person's own words, in a frame that was not used just before."""
        talk = self._talk
        said = mirrored(self._said)
        if not said.text:
            return ""
        if kind in sentences.QUOTING:
            frame = talk.pick(f"quote/{kind}", sentences.QUOTING[kind])
            return _framed(frame, quotation(tidy(self._said), 16) or said.text)
        if said.quoted:
            return _framed(talk.pick("quoted", sentences.REFLECT_QUOTED), said.text)
        return _framed(talk.pick("turned", sentences.REFLECT), said.text)


def _framed(frame: str, said: str) -> str:
    """Puts words into a sentence; `{1}` stands for them with a capital letter."""
    if frame.startswith("{0}"):
        said = f"{said[:1]}{said[1:2].upper()}{said[2:]}"  # a quotation: its mark comes first
    return frame.format(said, said[:1].upper() + said[1:])


def _names_a_topic(what: str) -> bool:
    """Whether a wish said with a new start is more than the wish for a new start."""
    return not {"topic", "goal", "subject", "over", "again"}.intersection(plain_words(what))


def _bounded(text: str) -> str:
    """A text within the bound of goals, cut between words, with a capital letter."""
    if len(text) > MAX_GOAL:
        text = text[: MAX_GOAL - 1].rsplit(" ", 1)[0] + "\u2026"
    text = text.strip()
    return text[:1].upper() + text[1:]


def _quoted(text: str, most: int = 25) -> str:
    return quotation(text, most)


def _argument(arguments_json: str, name: str) -> str:
    try:
        arguments: Any = json.loads(arguments_json)
    except ValueError:
        return ""
    value = arguments.get(name) if isinstance(arguments, dict) else None
    return value if isinstance(value, str) else ""


def _listed(output: str) -> str:
    """The goals that the tool gave, in a sentence."""
    try:
        goals: Any = json.loads(output)
    except ValueError:
        goals = None
    if isinstance(goals, dict):
        goals = goals.get("goals")
    if not isinstance(goals, list) or not all(isinstance(goal, dict) for goal in goals):
        return sentences.NOT_READ
    if not goals:
        return "No goal is saved for you here yet."
    named = []
    for goal in goals[:5]:
        step = str(goal.get("commitment") or "")
        due = str(goal.get("due") or "")
        after = f", next step {_quoted(step)}" if step else ""
        named.append(f"{_quoted(str(goal.get('goal') or ''))}{after}{f', due {due}' if due else ''}")
    more = f"; and {len(goals) - 5} more" if len(goals) > 5 else ""
    count = "one goal" if len(goals) == 1 else f"{len(goals)} goals"
    return f"You have {count} saved here, newest first: {'; '.join(named)}{more}."
