"""A conversation: messages and their replies, and the commands between them."""

import contextlib
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC
from enum import Enum, auto
from itertools import islice
from typing import TypeAlias, assert_never

import grpc

from entrypoints.cli.connection import Service
from entrypoints.cli.failure import Failure
from entrypoints.cli.terminal import PROMPT, Lines, Screen
from entrypoints.client import CoachClient, ConnectionLost, Event, Reply, Resuming, ServiceError
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb

_LISTED = 20
_SHOWN = 50
_WORDS = 40
_DOMAINS = ("career", "health", "relationship", "general")
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")
_HELP = """\
/threads         your conversations
/thread N|ID     go on with one of them
/new [DOMAIN]    begin another one: career, health, relationship or general
/history         what was said
/delete          delete this conversation for good
/quit            leave; Ctrl-D too
Ctrl-C cancels a reply; at the prompt, or pressed again, it leaves."""
_ADVICE = {
    "TURN_IN_PROGRESS": "Send it again when that has ended; /history shows its reply.",
    "THREAD_NOT_FOUND": "/threads lists yours.",
    "TURN_NOT_FOUND": "Its conversation has been deleted.",
    "QUOTA_EXCEEDED": "Try again when one of them has ended.",
}


class _Mark(Enum):
    """What a queue of events holds beside them."""

    INTERRUPT = auto()
    END = auto()


@dataclass(frozen=True)
class _Uncancelled:
    error: ServiceError


_Message: TypeAlias = "tuple[str, pb.Domain.ValueType, str]"
"""The thread, what a new one is about, and the text."""
_Item: TypeAlias = "Event | _Mark | _Uncancelled | BaseException"


class _CommandError(Exception):
    """A command can't be carried out. Its text says why."""


class Session:
    """One person's conversation on one screen."""

    def __init__(
        self,
        client: CoachClient,
        service: Service,
        screen: Screen,
        lines: Lines,
        *,
        domain: str = "",
        thread_id: str = "",
    ) -> None:
        self._client = client
        self._service = service
        self._screen = screen
        self._lines = lines
        self._domain = domain
        self._thread_id = thread_id
        self._listed: list[str] = []
        self._unsure: tuple[_Message, str] | None = None
        self._interrupted = False
        self._all_completed = True
        self._commands: dict[str, Callable[[str], None]] = {
            "/threads": self._list_threads,
            "/thread": self._switch,
            "/new": self._begin_another,
            "/history": self._show_history,
            "/delete": self._delete,
            "/help": lambda _: self._screen.note(_HELP),
        }

    def run(self) -> bool:
        """Talks until there is nothing more to say; returns whether it went well.

        In a terminal, leaving is always well; from a pipe, every turn must have completed. Raises Failure,
        BrokenPipeError, and KeyboardInterrupt for whoever leaves with Ctrl-C.
        """
        interactive = self._lines.interactive
        try:
            self._open()
            while (line := self._lines.read()) is not None:
                if line.strip() == "/quit":
                    break
                if line.strip():
                    self._obey_or_say(line)
            else:
                if interactive:
                    self._screen.note()
        except KeyboardInterrupt:
            if interactive:
                self._screen.note()
                self._say_how_to_go_on()
            raise
        except ServiceError as error:
            raise Failure(_told(error)) from error
        if interactive:
            self._say_how_to_go_on()
        return interactive or self._all_completed

    def _open(self) -> None:
        thread = None
        if self._thread_id:
            thread = self._client.thread(self._thread_id)
            about = _domain_name(thread.domain)
            if self._domain not in ("", about):
                raise Failure(f"thread {thread.id} is about {about}, not {self._domain}: leave --domain out")
            self._domain = about
        if self._lines.interactive:
            self._greet()
            if thread is not None:
                self._screen.note(f"This conversation has {thread.message_count} messages; /history shows them.")
            self._screen.note()

    def _greet(self) -> None:
        about = self._domain or "general"
        agents = self._client.agents()
        agent = next((agent for agent in agents if _domain_name(agent.domain) == about), agents[0])
        if agent.provider == "practice":
            played = "the practice coach: built in, no AI, no key, no network"
        else:
            played = f"{agent.provider}, {agent.model}"
        self._screen.note(f"{agent.name} ({played}). /help lists the commands.")
        self._screen.note(f"What is said is kept in {self._service.record}.")

    def _say_how_to_go_on(self) -> None:
        if self._thread_id:
            self._screen.note(f"To go on with this conversation: --thread {self._thread_id}")

    # Commands

    def _obey_or_say(self, line: str) -> None:
        found = _COMMAND.match(line.strip())
        name = found[0] if found else ""
        if name in self._commands:
            argument = line.strip().removeprefix(name).strip()
            try:
                self._service.revive()
                self._commands[name](argument)
            except (_CommandError, ServiceError) as error:
                text = _told(error) if isinstance(error, ServiceError) else str(error)
                if not self._lines.interactive:
                    # What follows was meant for another conversation than the one that it would reach.
                    raise Failure(f"{name}: {text}") from error
                self._screen.note(text)
        elif name and line.startswith(name) and self._lines.interactive:
            self._screen.note(f"There is no command {name}; /help lists them. With a space before it, it is said.")
        else:
            self._say(line)

    def _list_threads(self, _: str) -> None:
        threads, more = self._client.threads(_LISTED)
        if not threads:
            self._screen.note("No conversations yet.")
        for number, thread in enumerate(threads, 1):
            here = "*" if thread.id == self._thread_id else " "
            state = "active" if thread.state == pb.THREAD_STATE_ACTIVE else "inactive"
            when = thread.last_message_at.ToDatetime(tzinfo=UTC).astimezone()
            row = f"{number:2}{here} {_domain_name(thread.domain):12}  {state:8}  {when:%Y-%m-%d %H:%M}"
            named = "" if self._lines.interactive else f"  {thread.id}"
            self._screen.note(f"{row}{named}  {self._title(thread)}")
        if more:
            self._screen.note(f"These are the newest {_LISTED}.")
        self._listed = [thread.id for thread in threads]

    def _title(self, thread: pb.Thread) -> str:
        title = thread.title
        if not title:
            title = next((_text(message) for message in self._client.messages(thread.id, 1)), "")
        words = " ".join(title.split())
        return words if len(words) <= _WORDS else f"{words[: _WORDS - 1]}…"

    def _switch(self, which: str) -> None:
        if not which:
            raise _CommandError("Which one? /thread N with a number of /threads, or /thread ID.")
        if which.isdecimal() and len(which) < 4:
            if not self._listed:
                threads, _ = self._client.threads(_LISTED)
                self._listed = [thread.id for thread in threads]
            if not 0 < int(which) <= len(self._listed):
                raise _CommandError(f"There is no conversation {which}; /threads lists them.")
            which = self._listed[int(which) - 1]
        thread = self._client.thread(which)
        self._thread_id, self._domain = thread.id, _domain_name(thread.domain)
        self._screen.note(
            f"You are in the conversation about {self._domain}: {self._title(thread)} "
            f"({thread.message_count} messages; /history shows them)."
        )

    def _begin_another(self, domain: str) -> None:
        if domain and domain not in _DOMAINS:
            raise _CommandError(f"A conversation can be about {', '.join(_DOMAINS[:-1])} or {_DOMAINS[-1]}.")
        self._thread_id = ""
        self._domain = domain or (self._domain if self._domain in _DOMAINS else "")
        self._screen.note(f"A new conversation about {self._domain or 'general'} begins with your next message.")

    def _show_history(self, _: str) -> None:
        if not self._thread_id:
            self._screen.note("Nothing has been said yet.")
            return
        newest = list(islice(self._client.messages(self._thread_id, _SHOWN, newest_first=True), _SHOWN + 1))
        if len(newest) > _SHOWN:
            self._screen.note(f"(the newest {_SHOWN} lines)")
        for message in reversed(newest[:_SHOWN]):
            match message.role:
                case pb.ROLE_USER:
                    self._screen.note(f"{PROMPT}{_text(message)}")
                case pb.ROLE_ASSISTANT:
                    self._screen.note(f"{_text(message)}{' (broken off)' if message.partial else ''}\n")
                case _:
                    """The coach's notes to itself."""

    def _delete(self, confirmation: str) -> None:
        if not self._thread_id:
            raise _CommandError("There is nothing to delete: nothing has been said yet.")
        if confirmation != "yes":
            thread = self._client.thread(self._thread_id)
            raise _CommandError(
                f"/delete yes deletes this conversation about {_domain_name(thread.domain)} for good: "
                f"{self._title(thread)} ({thread.message_count} messages)."
            )
        self._client.delete_thread(self._thread_id)
        self._screen.note("The conversation is deleted.")
        self._begin_another("")

    # Messages

    def _say(self, text: str) -> None:
        domain = pb.DOMAIN_UNSPECIFIED if self._thread_id else _domain_number(self._domain)
        message = (self._thread_id, domain, text)
        request_id = ""
        if self._unsure is not None and self._unsure[0] == message:
            request_id = self._unsure[1]  # the same message again, of which nobody knows whether it arrived
        try:
            with self._client.say(text, thread_id=self._thread_id, domain=domain, request_id=request_id) as reply:
                turn = self._watch(reply)
        except ServiceError as error:
            self._all_completed = False
            self._screen.end()
            if isinstance(error, ConnectionLost):
                self._tell_of_loss(error, message)
            else:
                self._screen.note(_told(error))
            self._heed_interrupt()
        else:
            self._unsure = None
            self._tell_of_end(turn)

    def _watch(self, reply: Reply) -> pb.Turn:
        """Shows a reply to its end. Ctrl-C cancels it, again leaves."""
        items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        turn: pb.Turn | None = None
        self._interrupted = lost = False
        try:
            # The stream is read in another thread: an interrupt must not hit it in the middle of its work.
            with _interrupts(lambda: items.put(_Mark.INTERRUPT)):
                _in_background(_pump, reply, items)
                while (item := items.get()) is not _Mark.END:
                    match item:
                        case _Mark.INTERRUPT:
                            if self._interrupted:
                                raise KeyboardInterrupt
                            self._interrupted = True
                            self._screen.note("(cancelling; Ctrl-C again leaves)")
                            _in_background(_cancel, reply, items)
                        case Resuming():
                            if not lost:
                                lost = True
                                self._screen.note(f"({_why(item.cause)}; trying again …)")
                            self._service.revive()
                        case _Uncancelled():
                            self._screen.note(f"Cancelling failed: {_told(item.error)}")
                        case BaseException():
                            raise item
                        case pb.TurnFinished():
                            turn = item.turn
                        case _:
                            lost = False
                            self._show(item)
        except BrokenPipeError:
            with contextlib.suppress(ServiceError):
                reply.cancel()
            raise
        self._screen.end()
        assert turn is not None
        self._heed_interrupt()
        return turn

    def _heed_interrupt(self) -> None:
        """Leaves if a pipe was interrupted: whoever does so does not mean the current line alone."""
        if self._interrupted and not self._lines.interactive:
            raise KeyboardInterrupt

    def _show(self, event: Event) -> None:
        match event:
            case pb.TurnStarted():
                self._thread_id = event.thread_id
            case pb.TextDelta():
                self._screen.text(event.text)
            case pb.ToolCall():
                if self._lines.interactive:
                    self._screen.note(f"· {event.name}")
            case pb.AttemptRestarted():
                self._screen.end()
                self._screen.note("(starting over)")
            case pb.ToolResult() | pb.TurnFinished() | Resuming():
                """Nothing to see."""
            case _:
                assert_never(event)

    def _tell_of_end(self, turn: pb.Turn) -> None:
        if turn.state != pb.TURN_STATE_COMPLETED:
            self._all_completed = False
            again = " Sending it again may help." if turn.error.retryable else ""
            kept = " What came of the reply is kept." if turn.state == pb.TURN_STATE_INCOMPLETE else ""
            self._screen.note(f"({turn.error.message}{kept}{again})")
        if self._lines.interactive:
            self._screen.note()

    def _tell_of_loss(self, loss: ConnectionLost, message: _Message) -> None:
        if loss.turn_id:
            said = (
                f"The connection was lost and the service has not come back ({loss.message}). Your message is "
                "safe, and so is the reply: once the service runs again, /history shows it."
            )
        else:
            self._unsure = (message, loss.request_id)
            said = (
                f"The service could not be reached ({loss.message}). Your message may not have arrived: send it "
                "again once the service runs. It will not be doubled."
            )
        if self._lines.interactive:
            self._screen.note(said)
            return
        on = f" Go on with --thread {self._thread_id}." if self._thread_id else ""
        raise Failure(f"{said}{on}") from loss


def _pump(reply: Reply, items: "queue.SimpleQueue[_Item]") -> None:
    try:
        for event in reply:
            items.put(event)
    except BaseException as error:  # noqa: BLE001 - it is raised in the thread that shows the reply
        items.put(error)
    else:
        items.put(_Mark.END)


def _cancel(reply: Reply, items: "queue.SimpleQueue[_Item]") -> None:
    try:
        reply.cancel()
    except ServiceError as error:
        items.put(_Uncancelled(error))


def _in_background(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


@contextlib.contextmanager
def _interrupts(tell: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C tells, and raises nothing. Ignored where it was, as in a background job."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not ours or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: tell())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _domain_number(name: str) -> pb.Domain.ValueType:
    return pb.Domain.Value(f"DOMAIN_{name.upper()}") if name else pb.DOMAIN_UNSPECIFIED


def _domain_name(number: pb.Domain.ValueType) -> str:
    try:
        return pb.Domain.Name(number).removeprefix("DOMAIN_").lower()
    except ValueError:
        return "something newer"


def _text(message: pb.Message) -> str:
    return "\n".join(part.text or part.refusal for part in message.content)


def _why(error: ServiceError) -> str:
    """The service's own words; the library's are of no use to the person who waits."""
    return error.message.rstrip(".") if error.reason else "the connection is lost"


def _told(error: ServiceError) -> str:
    advice = _ADVICE.get(error.reason, "")
    if error.code is grpc.StatusCode.UNAVAILABLE:
        advice = "Try again in a moment."
    return f"{error} {advice}".rstrip()
