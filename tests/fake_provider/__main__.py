"""The provider in a process of its own: `PYTHONPATH=tests python -m fake_provider --help`."""

import argparse
import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fake_provider import FakeProvider, Load
from fake_provider.control import HELP, apply_settings
from fake_provider.dialects import DIALECTS
from fake_provider.faults import PLACES, rule_from, table
from fake_provider.reading import read_script

_ABOUT = """\
A fake of OpenAI's API (Responses, Conversations, models) for tests and benchmarks. It prints the value for
OPENAI_BASE_URL, then serves until it is stopped. What it sends fits the types of the SDK, what it is sent must.

Unless told otherwise it answers "You said: …". Token counts are a quarter of the characters.
"""

_SCRIPT = r"""  {"steps": [{"answer": {"output": [{"text": "Hello"}, {"call": {"name": "goals"}}]}},
             {"answer": {"output": [{"text": {"text": "I can't.", "refusal": true}}],
                         "ending": {"incomplete": "content_filter"}}},
             "rate_limit,retry_after=2"],
   "default": {"answer": {"output": [{"text": "{\"mood\": 7}"}]}},
   "faults": ["stall@middle,nth=3,seconds=5",
              {"fault": "cut", "at": "header", "times": "all", "text": "unlucky"}],
   "settings": {"models": {"gpt-6-luna": null, "gpt-4o": "2027-01-14"}, "context_limit": 1000}}"""

_EXAMPLES = f"""\
faults
  --fault NAME[@PLACE][,OPTION=VALUE]…      can be repeated; the first rule that fits a request for a response wins
  PLACE is one of {", ".join(PLACES)};
  or after=N for behind the N-th delta (0: before the first event). Without either it is `middle`.
  nth=N begins with the N-th request that fits (1), times=N strikes so often (1; all), text=WORDS fits requests
  whose input or history has these words, so with times=all the rest of a conversation, conversation=ID fits those
  of one by its id.

{table()}
  Connections are refused outright by POST /__fake__/refuse.
  A reply with everything but its end is `stall@end` or `eof@end`.

scripts (--script FILE.json)
{_SCRIPT}
  One step for each request for a response, then the default. Fields are those of the classes in script.py.

control
{HELP}
examples
  python -m fake_provider --listen 127.0.0.1:8123
  python -m fake_provider --fault rate_limit,retry_after=2,nth=2 --fault stall@middle,text=unlucky,times=all
  python -m fake_provider --like llamacpp
  python -m fake_provider --pace 25 --deltas 400 --stamps     every reply: 400 deltas, 25 a second
  python -m fake_provider --flat-out --deltas 1000000         every reply: as fast as it is read
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fake_provider",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 picks one (default)")
    parser.add_argument("--like", choices=DIALECTS, default="openai", help="which server to play")
    parser.add_argument("--chains", action="store_true", help="whatever it plays, take previous_response_id")
    parser.add_argument("--api-key", help="take this key only")
    parser.add_argument("--script", type=Path, metavar="FILE.json", help="what to answer")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help="what befalls; see below")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--pace", type=float, metavar="N", help="long replies, N deltas a second on schedule")
    load.add_argument(
        "--flat-out", action="store_true", help="long replies in large writes, as fast as they are read"
    )
    parser.add_argument("--deltas", type=int, default=200, help="how long those are (%(default)s)")
    parser.add_argument("--piece", default="word ", help="what each delta says (%(default)r)")
    parser.add_argument("--stamps", action="store_true", help="paced deltas begin with the time of sending")
    return parser.parse_args()


def _provider(args: argparse.Namespace) -> FakeProvider:
    host, _, port = args.listen.rpartition(":")
    provider = FakeProvider(api_key=args.api_key, host=host or "127.0.0.1", port=int(port), like=args.like)
    if args.chains:
        provider.dialect = replace(provider.dialect, chains=True)
    if args.script is not None:
        script = read_script(json.loads(args.script.read_text("utf-8")))
        provider.then(*script.steps)
        provider.default = script.default or provider.default
        provider.rules += script.faults
        apply_settings(provider, script.settings)
    if args.pace or args.flat_out:
        provider.default = Load(deltas=args.deltas, piece=args.piece, pace=args.pace, stamps=args.stamps)
    provider.rules += [rule_from(fault) for fault in args.fault]
    return provider


async def _serve(args: argparse.Namespace) -> None:
    async with _provider(args) as provider:
        print(provider.base_url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serves until it is stopped."""
    args = _arguments()
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(args))
    except (OSError, ValueError) as error:
        raise SystemExit(f"fake_provider: {error}") from error


if __name__ == "__main__":
    main()
