"""The page of the API: services, messages and enums of a descriptor set, with the comments of their sources."""

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

_HEAD = """\
# API

Generated from the comments in [proto/](../proto) by `make proto`. How clients should behave is in
[client.md](client.md), who may call what in [security.md](security.md).
"""
# Field numbers in descriptor.proto: they make the paths of comments.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_METHODS, _FIELDS, _NESTED, _VALUES = 2, 2, 3, 2
_SCALARS = {
    value.number: value.name.removeprefix("TYPE_").lower()
    for value in FieldDescriptorProto.DESCRIPTOR.enum_types_by_name["Type"].values
}

Path = tuple[int, ...]


def page(described: FileDescriptorSet) -> str:
    """The page, in Markdown. The files need their source information."""
    ours = [file for file in described.file if file.package.startswith("vidacoach.")]
    ours.sort(key=lambda file: (file.package.split(".")[1] != "agents", not file.service, file.name))
    lines = [_HEAD]
    for file in ours:
        lines.extend(_File(file).lines())
    return "\n".join(lines).rstrip() + "\n"


class _File:
    """One file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        for number, service in enumerate(self._file.service):
            yield from self._service(service, (_SERVICES, number))
        title = self._file.name.rpartition("/")[2].removesuffix(".proto").replace("_", " ").capitalize()
        if self._file.message_type or self._file.enum_type:
            yield f"\n## {title}: messages of `{self._file.package}`"
        for number, message in enumerate(self._file.message_type):
            yield from self._message(message, (_MESSAGES, number))
        for number, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (_ENUMS, number))

    def _service(self, service: ServiceDescriptorProto, path: Path) -> Iterator[str]:
        yield f"\n## {service.name}\n\n`{self._file.package}.{service.name}`\n\n{self._text(path)}"
        for number, method in enumerate(service.method):
            text = self._text((*path, _METHODS, number))
            yield f"\n### {service.name}.{method.name}\n\n{_shape(method)}\n\n{text}"

    def _message(self, message: DescriptorProto, path: Path) -> Iterator[str]:
        yield f"\n### {message.name}\n\n{self._text(path)}"
        if message.field:
            yield "\n| field | type | |\n|---|---|---|"
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        for number, field in enumerate(message.field):
            choice = (
                f"one of `{message.oneof_decl[field.oneof_index].name}`: "
                if field.HasField("oneof_index") and not field.proto3_optional
                else ""
            )
            text = self._text((*path, _FIELDS, number)).replace("\n", " ").replace("|", "\\|")
            yield f"| `{field.name}` = {field.number} | {_type(field, maps)} | {choice}{text} |"
        for number, nested in enumerate(message.nested_type):
            if nested.name not in maps:
                yield from self._message(nested, (*path, _NESTED, number))

    def _enum(self, enum: EnumDescriptorProto, path: Path) -> Iterator[str]:
        yield f"\n### {enum.name}\n\n{self._text(path)}\n\n| value | |\n|---|---|"
        for number, value in enumerate(enum.value):
            text = self._text((*path, _VALUES, number)).replace("\n", " ")
            yield f"| `{value.name}` = {value.number} | {text} |"

    def _text(self, path: Path) -> str:
        return "\n".join(line.strip() for line in self._comments.get(path, "").splitlines())


def _shape(method: MethodDescriptorProto) -> str:
    asked, answered = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
    return f"{_link(asked)} → {'stream of ' if method.server_streaming else ''}{_link(answered)}"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        key, value = maps[name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    if not field.type_name:
        one = _SCALARS[field.type]
    else:
        one = f"`{field.type_name.strip('.')}`" if field.type_name.startswith(".google.") else _link(name)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {one}"
    return f"optional {one}" if field.proto3_optional else one


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"
