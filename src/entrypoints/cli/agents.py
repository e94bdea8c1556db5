"""`vida-coach agents`."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from entrypoints.cli.failure import FAILED
from entrypoints.cli.operating import EXIT_CODES, add_dry_run, add_format, command
from entrypoints.cli.shown import as_json, print_json, print_table

if TYPE_CHECKING:
    from core.model.agent import AgentDefinition
    from entrypoints.cli.record import Record

_CATALOG = (
    "The catalog is what this command's own settings name: the coaches that come with the service, those of "
    "VIDA_AGENTS_DIR over them, or OPENAI_ASSISTANT_ID's."
)


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "agents",
        help="list agent versions, compare the catalog with the record, publish it",
        description=f"Agent versions. {_CATALOG} The record keeps every version that was ever published.",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(role="agents")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listed = commands.add_parser(
        "list",
        help="list the versions in the catalog and on record",
        description=f"Lists agent versions with the threads that are pinned to each. {_CATALOG}",
        epilog=EXIT_CODES,
    )
    listed.set_defaults(run=command(_list))
    diff = commands.add_parser(
        "diff",
        help="compare the catalog with the record",
        description="Says what a publish would add: NEW versions, and in which fields they differ from the newest "
        "one on record. A version that is on record with other content is CHANGED: an error (exit code 1). "
        f"Raise its number. {_CATALOG}",
        epilog=EXIT_CODES,
    )
    diff.set_defaults(run=command(_publish), dry_run=True)
    publish = commands.add_parser(
        "publish",
        help="put the catalog's versions on record",
        description="Puts every NEW version of the catalog on record, or none if one is CHANGED. A service does "
        "so when it starts; done before, it can't fail to start because of that. Threads are pinned to a version "
        f"by the service that begins them, by its own catalog. {_CATALOG}",
        epilog=EXIT_CODES,
    )
    add_dry_run(publish)
    publish.set_defaults(run=command(_publish))
    for each in (listed, diff, publish):
        add_format(each)


def _catalog() -> "Mapping[str, AgentDefinition]":
    from entrypoints.container import Container
    from entrypoints.settings import load_settings

    container = Container(settings=load_settings())
    return {definition.id: definition for definition in container.catalog().agents()}


async def _list(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api import facts
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    catalog = _catalog()
    recorded = (await record.admin.ListAgentVersions(api.ListAgentVersionsRequest())).versions
    pinned = {facts.definition_of(one.definition): one.threads for one in recorded}
    on_record = {definition.id for definition in pinned}
    versions = [*pinned, *(one for one in catalog.values() if one.id not in on_record)]
    rows = [
        {
            "agent_id": one.id,
            "slug": one.slug,
            "version": one.version,
            "domain": one.domain.value,
            "model": one.model,
            "tools": list(one.tools),
            "threads": pinned.get(one, 0),
            "in_catalog": one.id in catalog,
            "on_record": one.id in on_record,
        }
        for one in sorted(versions, key=lambda one: (one.slug, -one.version))
    ]
    if options.format == "json":
        print_json({"agents": rows})
        return 0
    header = ("agent", "domain", "model", "tools", "threads", "catalog", "record")
    print_table(header, map(_row, rows), none="no agents")
    return 0


def _row(row: dict[str, Any]) -> tuple[object, ...]:
    places = ("yes" if row["in_catalog"] else "no", "yes" if row["on_record"] else "no")
    return (row["agent_id"], row["domain"], row["model"], ",".join(row["tools"]) or "-", row["threads"], *places)


async def _publish(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api import facts
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    definitions = map(facts.to_definition, _catalog().values())
    response = await record.admin.PublishAgents(
        api.PublishAgentsRequest(definitions=definitions, dry_run=options.dry_run)
    )
    answer = as_json(response)
    if options.format == "json":
        print_json({**answer, "dry_run": options.dry_run})
    else:
        header = ("agent", "outcome", "compared with", "differs in")
        rows = [
            (one["agent_id"], one["outcome"], one["compared_with"] or "-", ", ".join(one["fields"]) or "-")
            for one in answer["publications"]
        ]
        print_table(header, rows, none="no agents")
    changed = [one["agent_id"] for one in answer["publications"] if one["outcome"] == "CHANGED"]
    if changed:
        print(
            f"vida-coach: on record with other content: {', '.join(changed)}. Versions never change: raise the "
            "version. Nothing can be published before.",
            file=sys.stderr,
        )
        return FAILED
    new = sum(one["outcome"] == "NEW" for one in answer["publications"])
    print(f"{new} versions {'to publish' if options.dry_run else 'published'}", file=sys.stderr)
    return 0
