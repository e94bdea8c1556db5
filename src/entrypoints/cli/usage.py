"""`vida-coach usage`."""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from entrypoints.cli.failure import USAGE, Failure, explained
from entrypoints.cli.record import on_record

if TYPE_CHECKING:
    from core.use_cases.report_usage import ReportLine, ReportQuery, UsageReport
    from entrypoints.cli.record import Record

_DIMENSIONS = ("user", "agent", "model", "day")
_NUMBERS = ("turns", "input", "cached", "written", "output", "reasoning", "cost")


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "usage",
        help="what turns have cost: tokens and money, by user, agent, model and day",
        description="Adds up what turns have cost, by the UTC day in which they ended, and prices it with the "
        "list of prices that comes with the service, or that of VIDA_PRICES. Tokens of a model without a price "
        "have no cost. Turns that were cut off count with the tokens that the provider had named by then: where "
        "there are such turns, or models without a price, a cost is the least that it can be (>).",
        epilog="exit codes: 0 done, 1 failed, 2 usage",
    )
    parser.add_argument(
        "--by",
        type=_dimensions,
        default=("day", "user"),
        metavar="THINGS",
        help="a line for each of these, separated by commas: user, agent, model, day (default: day,user)",
    )
    parser.add_argument("--user", default="", metavar="ID", help="only this user")
    parser.add_argument("--agent", default="", metavar="ID", help="only this agent version, e.g. career-v1")
    parser.add_argument(
        "--since", type=_day, metavar="DAY", help="first day, YYYY-MM-DD (default: 29 days before the last)"
    )
    parser.add_argument("--until", type=_day, metavar="DAY", help="last day, YYYY-MM-DD (default: today)")
    parser.add_argument(
        "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
    )
    parser.set_defaults(run=run)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be a day, YYYY-MM-DD") from error


def _dimensions(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if not set(names) <= set(_DIMENSIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must name some of {', '.join(_DIMENSIONS)}, each once")
    return names


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with explained():
        from core.model.errors import InvalidField
        from core.model.ledger import Dimension
        from core.use_cases.report_usage import ReportQuery
        from entrypoints.observability import set_up_logging
        from entrypoints.settings import load_settings

        settings = load_settings()
        set_up_logging(settings)
        query = ReportQuery(
            by=tuple(map(Dimension, options.by)),
            user_id=options.user,
            agent_id=options.agent,
            since=options.since,
            until=options.until,
        )
        try:
            query.check()
            report = on_record(settings, "usage", lambda record: _report(record, query))
        except InvalidField as error:
            raise Failure(f"--{error.field} {error.problem}", USAGE) from error
    if options.format == "json":
        print(json.dumps(_as_json(options.by, report)))
    else:
        print(_as_text(options.by, report))
    return 0


async def _report(record: "Record", query: "ReportQuery") -> "UsageReport":
    from core.use_cases.report_usage import UsageReport
    from entrypoints.grpc_api import mapping

    lines: list[ReportLine] = []
    since = until = date.min
    currency = ""
    async for response in record.admin.ReportUsage(mapping.to_report_request(query)):
        since, until = date.fromisoformat(response.since_day), date.fromisoformat(response.until_day)
        currency = response.currency
        lines += map(mapping.report_line_of, response.lines)
    return UsageReport(since=since, until=until, currency=currency, lines=lines)


def _as_json(by: Sequence[str], report: "UsageReport") -> dict[str, object]:
    return {
        "since": report.since.isoformat(),
        "until": report.until.isoformat(),
        "currency": report.currency,
        "lines": [dict(zip(by, line.group, strict=True)) | _sums(line) for line in report.lines],
        "total": _sums(report.total),
    }


def _sums(line: "ReportLine") -> dict[str, object]:
    usage, cost = line.tally.usage, line.known_cost
    return {
        "turns": line.tally.turns,
        "unmetered_turns": line.tally.unmetered_turns,
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": usage.cached_input_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost": None if cost is None else f"{cost.normalize():f}",
        "unpriced_tokens": line.unpriced_tokens,
    }


def _as_text(by: Sequence[str], report: "UsageReport") -> str:
    """A table; `>` before a cost says that it is at least that much, `?` that nothing is known of it."""
    total = report.total
    rows = [(*by, *_NUMBERS[:-1], report.currency)]
    rows += [(*(value or "-" for value in line.group), *_cells(line)) for line in report.lines]
    if len(report.lines) > 1:
        rows.append((*("total" if not place else "" for place in range(len(by))), *_cells(total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if place < len(by) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if not report.lines:
        table = ["no turns"]
    notes = [f"turns that ended from {report.since} to {report.until} (UTC)"]
    if unmetered := total.tally.unmetered_turns:
        notes.append(f"{unmetered} turns were cut off: the provider did not say all that they cost")
    if unpriced := total.unpriced_tokens:
        notes.append(f"{unpriced} tokens are of models without a price: set VIDA_PRICES")
    return "\n".join([*table, "", *notes])


def _cells(line: "ReportLine") -> tuple[str, ...]:
    usage, cost = line.tally.usage, line.known_cost
    least = ">" if line.tally.unmetered_turns or line.unpriced_tokens else ""
    counts = (
        line.tally.turns,
        usage.input_tokens,
        usage.cached_input_tokens,
        usage.cache_write_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
    )
    return (*map(str, counts), "?" if cost is None else f"{least}{cost:.6f}")
