"""Forms in which a model must answer: dataclasses as JSON Schema, in the dialect of strict structured output."""

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from adapters.openai.errors import ProviderFault
from core.model.turn import TurnReason

T = TypeVar("T")

_LEFT_OUT = frozenset({"default", "title"})


def schema_of(form: type[object]) -> dict[str, Any]:
    """The form's schema. Strict output wants every property required, and no others."""
    schema: dict[str, Any] = _strict(TypeAdapter(form).json_schema())
    return schema


def filled(form: type[T], text: str) -> T:
    """Reads an answer. Raises ProviderFault (`PROVIDER_PROTOCOL`) where it does not fit the form."""
    try:
        return TypeAdapter(form).validate_json(text)
    except ValidationError:
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL) from None  # its text holds what was answered


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {
        key: _strict(value) for key, value in node.items() if key not in _LEFT_OUT or isinstance(value, dict)
    }
    if isinstance(properties := strict.get("properties"), dict):
        strict |= {"required": list(properties), "additionalProperties": False}
    return strict
