"""The practice coach holds a conversation, and holds it again from the transcript alone."""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from adapters.practice import PracticeAgent
from adapters.practice.crisis import AFTERWARDS, HELP
from adapters.practice.intents import confidence, names_time, outcome
from adapters.practice.language import Language
from adapters.practice.mirror import mirrored, turned, wish
from adapters.practice.questions import COMMON, QUESTIONS, SMALLER
from adapters.practice.sentences import CANT_SEE, ENGLISH_ONLY, INTRODUCTION, NO_STEP, NOT_SAVED, SAVED, WORDLESS
from adapters.practice.steps import Step
from core.model.agent import AgentDefinition, Domain
from core.model.attachment import FilePart, ImagePart, Unread, without_data
from core.model.events import TextDelta, ToolCalled
from core.model.goal import MAX_GOAL
from core.model.message import ContentPart, Message, Role, TextPart, ToolExchange
from core.ports.agent import AgentEvent, ReplyRequest, RoundFinished, ToolRound
from core.ports.tools import ToolSpec
from doubles import definition
from samples import PNG

NOW = datetime(2026, 11, 22, tzinfo=UTC)
TOOLS = ("set_goal", "list_goals")

Run = Callable[[ToolCalled], tuple[str, bool]]


def _saves(call: ToolCalled) -> tuple[str, bool]:
    if call.name == "list_goals":
        return '{"goals": [{"goal": "Sleep", "commitment": "Lights out at ten", "due": null}]}', False
    return '{"saved": true}', False


def _fails(call: ToolCalled) -> tuple[str, bool]:
    return '{"error": "The tool failed."}', True


@dataclass
class Talk:
    """A conversation, kept as the service keeps it: what is stored is all that the coach is given."""

    domain: Domain = Domain.CAREER
    thread_id: str = "thread"
    tools: Sequence[str] = TOOLS
    run: Run = _saves
    lines: list[Message] = field(default_factory=list)
    calls: list[ToolCalled] = field(default_factory=list)
    turns: int = 0

    async def say(self, *parts: str | ImagePart | FilePart, kept: int | None = -1) -> str:
        """Says something; returns the reply. Of it `kept` code points are stored, all for -1, no line for None."""
        self.turns += 1
        content = tuple(TextPart(part) if isinstance(part, str) else part for part in parts)
        message = self._line(Role.USER, content)
        reply, exchanges = await self._reply(message)
        self.lines.append(message)
        for exchange in exchanges:
            self.lines.append(self._line(Role.TOOL, (), tool=exchange))
        if kept is not None:
            text = reply if kept == -1 else reply[:kept]
            self.lines.append(self._line(Role.ASSISTANT, (TextPart(text),), partial=kept != -1))
        return reply

    async def walk(self, *texts: str) -> str:
        """Says several things; returns the last reply."""
        reply = ""
        for text in texts:
            reply = await self.say(text)
        return reply

    async def _reply(self, message: Message) -> tuple[str, list[ToolExchange]]:
        request = self.request(message)
        exchanges: list[ToolExchange] = []
        said = ""
        for _ in range(3):
            events = [event async for event in PracticeAgent(0).reply(request)]
            assert isinstance(events[-1], RoundFinished)
            assert sum(isinstance(event, RoundFinished) for event in events) == 1
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
            said += text
            answered = []
            for call in [event for event in events if isinstance(event, ToolCalled)]:
                self.calls.append(call)
                answered.append(ToolExchange(call.call_id, call.name, call.arguments_json, *self.run(call)))
            if not answered:
                return said, exchanges
            exchanges += answered
            request = self.request(message, (*request.rounds, ToolRound(text, tuple(answered))))
        raise AssertionError("the coach goes on calling tools")

    def request(self, message: Message, rounds: tuple[ToolRound, ...] = ()) -> ReplyRequest:
        """What the service would ask."""
        before = tuple(replace(line, content=without_data(line.content)) for line in self.lines)

        async def history(data: int = 0) -> Sequence[Message]:
            assert data == 0
            return before

        return ReplyRequest(
            turn_id=message.turn_id,
            thread_id=self.thread_id,
            user_id="ada",
            domain=self.domain,
            definition=definition(self.domain),
            message=message,
            history=history,
            tools=[ToolSpec(name=name, description="", parameters={}) for name in self.tools],
            rounds=rounds,
        )

    def _line(
        self,
        role: Role,
        content: tuple[ContentPart, ...],
        *,
        partial: bool = False,
        tool: ToolExchange | None = None,
    ) -> Message:
        return Message(
            id=f"m{len(self.lines)}",
            thread_id=self.thread_id,
            turn_id=f"turn-{self.turns}",
            index=len(self.lines) + 1,
            role=role,
            content=content,
            partial=partial,
            created_at=NOW,
            tool=tool,
        )


def asks(reply: str, domain: Domain, step: Step) -> bool:
    """Whether a reply ends in a question of this step."""
    return reply.endswith(QUESTIONS[domain].get(step) or COMMON[step])


TO_THE_STEP = (
    "I want to find work that counts for something",
    "I would look forward to Mondays",
    "I send one application a month",
    "I'm too tired in the evening",
    "ask Dana, or rewrite my CV",
    "asking Dana",
)
COMMITMENT = "I'll write to Dana on Thursday morning"
GOAL = "Find work that counts for something"


@pytest.mark.parametrize("domain", list(Domain))
async def test_a_whole_conversation_follows_grow(domain: Domain) -> None:
    talk = Talk(domain)
    first = await talk.say("Hi")
    assert INTRODUCTION[domain] in first
    assert "no AI model" in first
    assert asks(first, domain, Step.GOAL)
    expected = [Step.SIGN, Step.NOW, Step.OBSTACLE, Step.OPTIONS, Step.CHOICE, Step.STEP]
    replies = [first]
    for text, step in zip(TO_THE_STEP, expected, strict=True):
        replies.append(await talk.say(text))
        assert asks(replies[-1], domain, step), replies[-1]
    replies.append(await talk.say(COMMITMENT))
    assert asks(replies[-1], domain, Step.CONFIDENCE)
    replies.append(await talk.say("8"))
    assert asks(replies[-1], domain, Step.TAKEAWAY)
    assert GOAL in replies[-1]
    assert COMMITMENT in replies[-1]
    replies.append(await talk.say("That one message is enough"))
    assert "?" not in replies[-1]
    replies.append(await talk.say("I did it and she answered"))
    assert asks(replies[-1], domain, Step.LEARNED)
    replies.append(await talk.say("I kept it short"))
    replies.append(await talk.say("I want to learn to say no"))
    assert asks(replies[-1], domain, Step.SIGN), "a new round has begun"

    sentences = [sentence for reply in replies for sentence in re.split(r"(?<=[.?!])\s+", reply)]
    assert len(sentences) == len(set(sentences)), "no sentence comes twice"
    for reply in replies:
        assert reply.count("?") <= 1, "one question at a time"
        assert len(re.split(r"(?<=[.?!])\s+", reply)) <= 4, "short replies"


async def test_the_persons_words_are_given_back_turned_round() -> None:
    assert "you want to find work that you like" in (await Talk().say("I want to find work that I like")).lower()


@pytest.mark.parametrize(
    ("said", "back", "quoted"),
    [
        ("I hate my job and I don't know what to do", "you hate your job and you don't know what to do", False),
        ("I\u2019m stuck.", "\u201cI'm stuck\u201d", True),
        ("I was never good enough for him", "you were never good enough for him", False),
        ("I wasn't asked about it", "you weren't asked about it", False),
        ("My manager doesn't listen to me", "your manager doesn't listen to you", False),
        ("We fight about money all the time", "you fight about money all the time", False),
        ("I work nights and am tired", "\u201cI work nights and am tired\u201d", True),
        ("you know I can't sleep at all", "\u201cyou know I can't sleep at all\u201d", True),
        ("more money", "\u201cmore money\u201d", True),
        ("I tried to talk but she walked away", "she walked away", False),
        ("I am angry\n\n\U0001f621\U0001f621 at myself!", "you are angry", False),
        ("\U0001f621", "", True),
    ],
)
def test_words_are_turned_round_or_quoted(said: str, back: str, quoted: bool) -> None:
    given = mirrored(said)
    assert (given.text, given.quoted) == (back, quoted)


def test_what_would_be_garbled_is_not_turned_round() -> None:
    assert turned('she said "you never help me"') is None
    assert turned("I was late and was sorry") is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("I want to sleep better.", "to sleep better"),
        ("Hi, I'd really like to run 10k", "to run 10k"),
        ("I want a promotion", "a promotion"),
        ("How do I tell my boss that I need a break?", "to tell my boss that I need a break"),
        ("Should I quit my job?", "to decide whether to quit my job"),
        ("Help me get fit", "to get fit"),
        ("my goal is to be calm", "to be calm"),
        ("I don't want to argue", ""),
        ("I like to run", ""),
        ("I need help", ""),
        ("My boss hates me", ""),
    ],
)
def test_a_wish_is_recognised(said: str, wanted: str) -> None:
    assert wish(said) == wanted


async def test_the_same_transcript_gets_the_same_text() -> None:
    texts = ["Hello", *TO_THE_STEP, COMMITMENT, "6", "more sleep"]
    one, two = Talk(), Talk()
    assert [await one.say(text) for text in texts] == [await two.say(text) for text in texts]


async def test_threads_begin_with_different_questions() -> None:
    assert len({await Talk(thread_id=f"t{number}").say("Hi") for number in range(12)}) == 3


async def test_it_goes_on_where_it_stood_after_a_turn_without_a_reply() -> None:
    talk = Talk()
    await talk.walk("Hi", TO_THE_STEP[0])
    lost = await talk.say("I would look forward to Mondays", kept=None)
    again = await talk.say("I would look forward to Mondays")
    assert asks(lost, Domain.CAREER, Step.NOW)
    assert asks(again, Domain.CAREER, Step.NOW)
    assert asks(await talk.say("I send one application a month"), Domain.CAREER, Step.OBSTACLE)


@pytest.mark.parametrize("kept", [None, 0, 1, 30])
async def test_words_whose_answer_was_lost_are_not_forgotten(kept: int | None) -> None:
    talk = Talk()
    await talk.say("Hi")
    await talk.say("I want my own bakery", kept=kept)
    reply = await talk.say("are you there?")
    assert "your own bakery" in reply
    assert asks(reply, Domain.CAREER, Step.SIGN)


async def test_a_cut_reply_that_had_asked_its_question_counts() -> None:
    talk = Talk()
    await talk.say("Hi")
    whole = await talk.say("I want my own bakery", kept=10_000)
    assert asks(whole, Domain.CAREER, Step.SIGN)
    assert asks(await talk.say("People would queue"), Domain.CAREER, Step.NOW)


async def test_tool_lines_and_foreign_lines_in_the_transcript_do_no_harm() -> None:
    talk = Talk()
    await talk.say("Hi")
    stray = talk._line(Role.ASSISTANT, (TextPart("A word from somewhere else?"),))
    talk.lines.insert(0, replace(stray, turn_id="elsewhere"))
    assert asks(await talk.say("I want my own bakery"), Domain.CAREER, Step.SIGN)


async def test_the_goal_is_saved_with_the_tool_in_the_persons_words() -> None:
    talk = Talk()
    reply = await talk.walk(*TO_THE_STEP, COMMITMENT)
    (call,) = talk.calls
    assert call.name == "set_goal"
    assert json.loads(call.arguments_json) == {"goal": GOAL, "commitment": COMMITMENT}
    assert any(sentence in reply for sentence in SAVED)


async def test_a_step_without_a_time_is_asked_for_its_time_and_saved_with_it() -> None:
    talk = Talk()
    reply = await talk.walk(*TO_THE_STEP, "I'll write to Dana")
    assert asks(reply, Domain.CAREER, Step.WHEN)
    assert not talk.calls
    await talk.say("Tomorrow at nine")
    assert json.loads(talk.calls[0].arguments_json)["commitment"] == "I'll write to Dana, tomorrow at nine"


async def test_what_is_saved_is_no_longer_than_a_goal_may_be() -> None:
    talk = Talk()
    await talk.walk(f"I want to find {'meaningful ' * 90}work", *TO_THE_STEP[1:])
    await talk.say(f"I'll write on Thursday {'carefully ' * 90}")
    (call,) = talk.calls
    saved = json.loads(call.arguments_json)
    assert saved["goal"].startswith("Find meaningful ")
    assert saved["commitment"].startswith("I'll write on Thursday carefully ")
    for text in saved.values():
        assert MAX_GOAL - 12 <= len(text) <= MAX_GOAL
        assert text.endswith("\u2026")


async def test_it_says_honestly_that_a_goal_could_not_be_saved() -> None:
    talk = Talk(run=_fails)
    reply = await talk.walk(*TO_THE_STEP, COMMITMENT)
    assert any(sentence in reply for sentence in NOT_SAVED)
    assert asks(reply, Domain.CAREER, Step.CONFIDENCE)


async def test_without_the_tool_it_claims_nothing() -> None:
    talk = Talk(tools=())
    reply = await talk.walk(*TO_THE_STEP, COMMITMENT)
    assert not any(sentence in reply for sentence in SAVED)
    assert asks(reply, Domain.CAREER, Step.CONFIDENCE)


async def test_a_goal_that_was_saved_before_the_reply_was_lost_is_not_saved_again() -> None:
    talk = Talk()
    await talk.walk(*TO_THE_STEP)
    await talk.say(COMMITMENT, kept=None)
    reply = await talk.say("hello?")
    assert len(talk.calls) == 1
    assert any(sentence in reply for sentence in SAVED)


@pytest.mark.parametrize(
    "text", ["list my goals", "What are my goals?", "my goals", "show me my saved goals please"]
)
async def test_goals_are_listed_with_the_tool(text: str) -> None:
    talk = Talk()
    await talk.say("Hi")
    reply = await talk.say(text)
    assert [call.name for call in talk.calls] == ["list_goals"]
    assert "\u201cSleep\u201d, next step \u201cLights out at ten\u201d" in reply
    assert asks(reply, Domain.CAREER, Step.GOAL), "the conversation stays where it was"


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "No goal is saved for you here yet."),
        (1, "You have one goal saved here, newest first: \u201cGoal 0\u201d, next step \u201cGo\u201d, due 2026"),
        (5, "\u201cGoal 4\u201d, next step \u201cGo\u201d, due 2026-12-01."),
        (7, "\u201cGoal 4\u201d, next step \u201cGo\u201d, due 2026-12-01; and 2 more."),
    ],
)
async def test_goals_are_counted_and_the_first_five_told(count: int, told: str) -> None:
    goals = [{"goal": f"Goal {number}", "commitment": "Go", "due": "2026-12-01"} for number in range(count)]
    reply = await Talk(run=lambda _: (json.dumps({"goals": goals}), False)).say("my goals")
    assert told in reply
    assert (f"You have {count} goals saved here" in reply) is (count > 1)


@pytest.mark.parametrize("output", ["", "nonsense", "[]", '{"goals": 3}', '{"goals": [1]}', '{"goals": [{}]}'])
async def test_any_output_of_the_tool_is_survived(output: str) -> None:
    assert await Talk(run=lambda _: (output, False)).say("my goals")
    assert "could not read" in await Talk(run=lambda _: (output, True)).say("my goals")


@pytest.mark.parametrize("before", range(10))
async def test_a_crisis_is_answered_first_at_every_step_and_changes_nothing(before: int) -> None:
    texts = (*TO_THE_STEP, COMMITMENT, "5", "a calmer week", "that it is small")[:before]
    calm, talk = Talk(), Talk()
    await calm.walk(*texts)
    await talk.walk(*texts)
    calls = len(talk.calls)
    assert await talk.say("my goals do not matter, I want to kill myself") == HELP[Language.ENGLISH]
    assert len(talk.calls) == calls, "before any tool"
    after = await talk.say("I am with my sister now")
    assert after.startswith(AFTERWARDS[Language.ENGLISH])
    assert after.count(AFTERWARDS[Language.ENGLISH]) == 1
    later, undisturbed = await talk.say("I could say more"), await calm.say("I could say more")
    assert AFTERWARDS[Language.ENGLISH] not in later
    if 0 < before < 10:
        assert step_of(later) == step_of(undisturbed)


def step_of(reply: str) -> Step | None:
    """The step whose question a reply ends in."""
    return next(
        (
            step
            for step in Step
            if step in {*QUESTIONS[Domain.CAREER], *COMMON} and asks(reply, Domain.CAREER, step)
        ),
        None,
    )


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("I want to die", Language.ENGLISH),
        ("Quiero morir", Language.SPANISH),
        ("Ich will nicht mehr leben", Language.GERMAN),
        ("Je veux mourir", Language.FRENCH),
        ("Quero morrer", Language.PORTUGUESE),
    ],
)
async def test_a_crisis_in_the_first_message_is_answered_in_its_language(text: str, language: Language) -> None:
    talk = Talk()
    assert await talk.say(text) == HELP[language]
    assert await talk.say(text) == HELP[language]
    after = await talk.say("thank you")
    assert after.startswith(AFTERWARDS[language])
    assert INTRODUCTION[Domain.CAREER] in after


async def test_a_crisis_whose_answer_was_lost_is_still_remembered() -> None:
    talk = Talk()
    await talk.say("Hi")
    await talk.say("I want to die", kept=None)
    assert (await talk.say("hello?")).startswith(AFTERWARDS[Language.ENGLISH])


async def test_a_crisis_over_two_parts_is_heard() -> None:
    assert await Talk().say("All is bad.", "I want to die") == HELP[Language.ENGLISH]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Are you human?", "not a human"),
        ("are you a real person or a bot", "not a human"),
        ("who are you", "practice coach"),
        ("What can you do?", "one at a time"),
        ("help", "one at a time"),
        ("are you a therapist?", "without any qualification"),
        ("Is this private?", "stored by the service"),
        ("what should I do?", "no advice"),
        ("thanks!", ""),
        ("this is useless", ""),
        ("???", ""),
        ("ok", ""),
    ],
)
@pytest.mark.parametrize("started", [False, True])
async def test_what_is_no_answer_gets_its_own_reply_and_keeps_the_place(
    text: str, words: str, started: bool
) -> None:
    talk = Talk()
    if started:
        await talk.say("Hi")
    reply = await talk.say(text)
    assert words in reply
    assert reply.endswith("?")
    assert "practice coach" in reply or started
    assert asks(await talk.say("I want my own bakery"), Domain.CAREER, Step.SIGN)


async def test_not_knowing_gets_a_smaller_question_and_then_it_goes_on() -> None:
    talk = Talk()
    await talk.say(TO_THE_STEP[0])
    assert (await talk.say("idk")).endswith(SMALLER[Step.SIGN])
    assert asks(await talk.say("not sure"), Domain.CAREER, Step.NOW)


async def test_a_complaint_is_asked_for_what_is_wanted_instead() -> None:
    talk = Talk()
    await talk.say("Hi")
    reply = await talk.say("My boss has no time for me")
    assert "your boss has no time for you" in reply.lower()
    assert asks(await talk.say("A boss who has time"), Domain.CAREER, Step.SIGN)


async def test_a_low_confidence_is_asked_what_would_raise_it() -> None:
    talk = Talk()
    await talk.walk(*TO_THE_STEP, COMMITMENT)
    assert asks(await talk.say("maybe 4/10"), Domain.CAREER, Step.RAISE)
    assert asks(await talk.say("a calmer week"), Domain.CAREER, Step.TAKEAWAY)


async def test_a_step_that_was_not_taken_is_met_without_blame() -> None:
    talk = Talk()
    await talk.walk(*TO_THE_STEP, COMMITMENT, "9", "hope", "bye")
    assert "?" in await talk.say("I didn't do it, I forgot")
    assert asks(await talk.say("the week was full"), Domain.CAREER, Step.OPTIONS)


async def test_a_step_that_is_planned_once_more_is_saved_once_more() -> None:
    talk = Talk()
    await talk.walk(*TO_THE_STEP, COMMITMENT, "9", "hope", "I didn't do it", "the week was full", *TO_THE_STEP[4:])
    reply = await talk.say(COMMITMENT)
    assert any(sentence in reply for sentence in SAVED)
    first, second = talk.calls
    assert second.arguments_json == first.arguments_json


async def test_whoever_can_name_no_step_is_asked_twice_more_and_then_let_go() -> None:
    talk = Talk()
    await talk.walk(*TO_THE_STEP)
    for _ in range(2):
        assert (await talk.say("idk")).endswith(SMALLER[Step.STEP])
    reply = await talk.say("idk")
    assert any(sentence in reply for sentence in NO_STEP)
    assert "?" not in reply
    assert talk.calls == []
    assert asks(await talk.say("I want my own bakery"), Domain.CAREER, Step.SIGN), "a new round has begun"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Quiero dormir mejor por la noche", Language.SPANISH),
        ("Ich möchte besser schlafen", Language.GERMAN),
        ("Je voudrais mieux dormir la nuit", Language.FRENCH),
        ("Eu quero dormir melhor à noite", Language.PORTUGUESE),
        ("Я хочу лучше спать", None),
        ("もっとよく眠りたい", None),
    ],
)
async def test_it_says_that_it_speaks_english_only_and_keeps_the_place(
    text: str, language: Language | None
) -> None:
    talk = Talk()
    assert await talk.say(text) == ENGLISH_ONLY[language]
    assert asks(await talk.say("I want to sleep better"), Domain.CAREER, Step.SIGN)


@pytest.mark.parametrize(
    ("domain", "text", "word"),
    [
        (Domain.HEALTH, "I want to stop taking my antidepressants", "pharmacist"),
        (Domain.HEALTH, "I have chest pain when I run", "emergency number"),
        (Domain.CAREER, "My manager is bullying me", "union"),
        (Domain.RELATIONSHIP, "My boyfriend checks my phone", "domestic abuse service"),
        (Domain.GENERAL, "I have debts everywhere", "advice service"),
    ],
)
async def test_it_points_once_to_whose_matter_it_is(domain: Domain, text: str, word: str) -> None:
    talk = Talk(domain)
    assert word in await talk.say(text)
    assert word not in await talk.say(text)


@pytest.mark.parametrize(
    "text",
    [
        "so it goes on " * 4000,
        "x" * 65_536,
        "a\nb\r\n\n\tc \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "I am I was I",
        "{0} {x} %s \\",
        "\u201c\u201d\"'",
        "lone \ud800 surrogate",
        "nul \0 here",
        "?" * 2000,
        "I want to " * 500,
        "7" * 400,
    ],
)
async def test_odd_messages_are_answered_at_every_step(text: str) -> None:
    talk = Talk()
    for step in ("Hi", *TO_THE_STEP, COMMITMENT, "4", "rest", "hope", "I did it"):
        reply = await talk.say(text)
        assert reply.strip()
        assert len(reply) < 2000
        assert "\0" not in reply
        reply.encode()
        await talk.say(step)


async def test_a_long_history_is_replayed_beside_the_other_turns() -> None:
    talk = Talk()
    await talk.walk("Hi", "I want a garden. " + "green " * 9000, "a" * 60_000)
    assert await talk.say("nothing yet")


async def events_of(agent: PracticeAgent, text: str = "Hi") -> list[AgentEvent]:
    talk = Talk()
    request = talk.request(talk._line(Role.USER, (TextPart(text),)))
    return [event async for event in agent.reply(request)]


async def test_it_speaks_a_word_at_a_time_with_a_pause_between() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    events = await events_of(PracticeAgent(50, sleep))
    words = [event.text for event in events if isinstance(event, TextDelta)]
    assert all(re.fullmatch(r"\S+\s*", word) for word in words)
    assert pauses == [0.02] * (len(words) - 1)
    finished = events[-1]
    assert isinstance(finished, RoundFinished)
    assert finished.usage.input_tokens == 1
    assert finished.usage.output_tokens == len(words)
    assert finished.shortfall is None
    assert finished.copy is None


async def test_without_pace_it_never_sleeps() -> None:
    async def sleep(seconds: float) -> None:
        raise AssertionError("slept")

    assert await events_of(PracticeAgent(0, sleep))


async def test_the_pieces_of_a_help_text_are_the_help_text() -> None:
    events = await events_of(PracticeAgent(0), "I want to die")
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == HELP[Language.ENGLISH]


def test_a_negative_pace_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        PracticeAgent(-1)


async def test_what_reading_the_history_raises_is_the_engines_to_see() -> None:
    talk = Talk()
    request = talk.request(talk._line(Role.USER, (TextPart("Hi"),)))

    def broken(data: int = 0) -> Awaitable[Sequence[Message]]:
        raise RuntimeError("no history")

    object.__setattr__(request, "history", broken)
    with pytest.raises(RuntimeError, match="no history"):
        [event async for event in PracticeAgent(0).reply(request)]


def test_it_says_who_serves() -> None:
    agent = PracticeAgent()
    any_model: AgentDefinition = definition(model="gpt-6-luna")
    assert agent.provider == "practice"
    assert agent.model(any_model) == "practice-1"


def test_every_question_asks_one_thing() -> None:
    domains = [bank for domain in Domain for bank in QUESTIONS[domain].values()]
    for bank in [*domains, *COMMON.values(), *SMALLER.values()]:
        assert len(set(bank)) == len(bank)
        assert all(question.count("?") == 1 and question.endswith("?") for question in bank)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8", 8),
        ("7/10", 7),
        ("maybe a 3", 3),
        ("10!", 10),
        ("80%", 8),
        ("nine", 9),
        ("very sure", 8),
        ("not much", 4),
    ],
)
def test_confidence_is_read(text: str, number: int) -> None:
    assert confidence(text) == number


def test_plans_and_news_are_read() -> None:
    assert names_time("I'll do it on Friday")
    assert names_time("tomorrow at 9am")
    assert not names_time("I'll call her")
    assert outcome("I did it") is True
    assert outcome("I didn't do it") is False
    assert outcome("something new") is None


# Pictures and files

PICTURE, DOCUMENT = ImagePart(PNG, "image/png"), FilePart(Unread(9), "plan.pdf", "application/pdf")


@pytest.mark.parametrize(
    "parts",
    [
        (PICTURE,),
        (DOCUMENT, PICTURE),
        ("", PICTURE),
        ("This is my plan", DOCUMENT),
        ("Hello", PICTURE),
        ("I don't know", PICTURE),
        ("my goals", PICTURE),
    ],
    ids=repr,
)
async def test_what_can_not_be_seen_is_said_and_the_conversation_goes_on(
    parts: tuple[str | ImagePart | FilePart, ...],
) -> None:
    for before in ((), ("I want to lead a team",), ("I want to lead a team", "Nobody listens to me")):
        talk = Talk()
        await talk.walk(*before)
        reply = await talk.say(*parts)
        assert reply.count(CANT_SEE) == 1
        assert reply.endswith("?")
        assert not any(sentence in reply for sentence in WORDLESS)
        assert CANT_SEE not in await talk.say("I want to lead a team")


async def test_a_picture_alone_answers_no_question() -> None:
    plain, with_picture = Talk(), Talk()
    for talk in (plain, with_picture):
        await talk.walk("Hi", "I want to lead a team")
    await with_picture.say(PICTURE)
    replies = [await talk.say("Nobody listens to me in meetings") for talk in (plain, with_picture)]
    assert replies[0].split()[:4] == replies[1].split()[:4]  # the same step is reflected; questions take turns


async def test_a_picture_from_before_is_remembered_as_one() -> None:
    plain, with_picture = Talk(), Talk()
    for talk in (plain, with_picture):
        await talk.say("I want to lead a team")
    await with_picture.say(PICTURE)
    replies = [await talk.say("...") for talk in (plain, with_picture)]
    (first,), (second,) = ([sentence for sentence in WORDLESS if sentence in reply] for reply in replies)
    assert first == second  # a picture has used up none of them


async def test_words_beside_a_picture_are_answered() -> None:
    talk = Talk()
    assert "lead a team" in await talk.say("I want to lead a team", PICTURE)


@pytest.mark.parametrize("words", ["I want to kill myself", "Ich will nicht mehr leben"])
async def test_help_in_a_crisis_comes_without_a_word_on_pictures(words: str) -> None:
    talk = Talk()
    assert await talk.say(words, PICTURE) == await Talk().say(words)


async def test_a_language_that_is_not_spoken_beside_a_picture() -> None:
    reply = await Talk().say("Ich möchte gern über meine Arbeit sprechen", PICTURE)
    assert CANT_SEE in reply
    assert "Englisch" in reply
