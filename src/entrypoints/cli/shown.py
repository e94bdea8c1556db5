"""How commands show what they are told: JSON with stable keys, or columns for people."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def as_json(message: Any) -> dict[str, Any]:
    """A protobuf message with all its fields: times as RFC 3339, null where there is none; values of enums in
    lower case without their prefix, empty where there is none."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_one(each, field) for each in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _one(value, field)


def _one(value: Any, field: Any) -> Any:
    if field.enum_type is not None:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return field.enum_type.values_by_number[value].name.removeprefix(prefix).lower() if value else ""
    if field.message_type is None:
        return value
    if field.message_type.full_name == "google.protobuf.Timestamp":
        return value.ToJsonString()
    return as_json(value)


def print_json(value: Any) -> None:
    """Prints one JSON document on a line."""
    print(json.dumps(value))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, none: str) -> None:
    """Prints columns under a header, or a word where there are no rows."""
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    if len(lines) == 1:
        print(none)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
