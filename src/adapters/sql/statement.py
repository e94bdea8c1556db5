"""Statements that are built once and run many times.

SQLAlchemy writes them and knows how values go into the database and come out of it; the driver runs them. What the
library does for every execution - looking up the compiled form, making a context and a result - takes several
times what SQLite takes for the statement itself.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import ClauseElement, Dialect, ReturnsRows
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

from adapters.sql.driver import Column

Convert = Callable[[Any], Any]
Parameters = Mapping[str, Any]


class Statement:
    """A statement and the forms that it takes: one for each dialect and set of parameters.

    To be built once: a database keeps what it has made of it for as long as a connection lasts.
    """

    def __init__(self, element: ClauseElement) -> None:
        self._element = element
        self._forms: dict[tuple[str, ...], Form] = {}

    def form(self, dialect: Dialect, parameters: Parameters) -> "Form":
        """What the driver needs to run it with parameters of these names.

        An INSERT or UPDATE sets the columns of which there are parameters.
        """
        key = (dialect.name, *parameters)
        found = self._forms.get(key)
        if found is None:
            # Two threads may do this at once: both come to the same.
            found = self._forms[key] = Form(self._element, dialect, list(parameters))
        return found


class Form:
    """A statement as one driver takes it."""

    def __init__(self, element: ClauseElement, dialect: Dialect, names: list[str]) -> None:
        compiled = element.compile(dialect=dialect, column_keys=names)
        assert isinstance(compiled, SQLCompiler)
        self.sql = str(compiled)
        self._dialect = dialect
        converts = {name: _into(bind.type, dialect) for bind, name in compiled.bind_names.items()}
        # Values that the statement brings along are converted once, here.
        self._own = {name: converts[name](value) for name, value in compiled.params.items() if name not in names}
        needed = {name: converts[name] for name in names if converts.get(name, _as_it_is) is not _as_it_is}
        places = compiled.positiontup or []
        self._take = _taker(places)
        self._converts = [(number, needed[name]) for number, name in enumerate(places) if name in needed]
        self._types = (
            [column.type for column in element.exported_columns] if isinstance(element, ReturnsRows) else []
        )
        self._make: Callable[[Sequence[Any]], Any] | None = None
        self._outs: list[tuple[int, Convert]] = []

    def bind(self, parameters: Parameters) -> Sequence[Any]:
        """The parameters as the driver takes them."""
        if self._own:
            parameters = {**self._own, **parameters}
        taken = self._take(parameters)
        if not self._converts:
            return taken
        values = list(taken)
        for number, convert in self._converts:
            values[number] = convert(values[number])
        return values

    def rows(self, found: Sequence[Sequence[Any]], columns: Callable[[], Sequence[Column]]) -> list[Any]:
        """Rows as the driver gives them, as named tuples."""
        if self._make is None:
            self._learn(columns())
        assert self._make is not None
        if not self._outs:
            return [self._make(row) for row in found]
        result = []
        for row in found:
            values = list(row)
            for number, convert in self._outs:
                values[number] = convert(values[number])
            result.append(self._make(values))
        return result

    def _learn(self, columns: Sequence[Column]) -> None:
        outs = [
            (number, _out_of(type_, self._dialect, columns[number][1])) for number, type_ in enumerate(self._types)
        ]
        self._outs = [(number, convert) for number, convert in outs if convert is not None]
        row: Any = namedtuple("Row", [name for name, _ in columns], rename=True)  # type: ignore[misc] # known at run time
        self._make = row._make


def _taker(names: Sequence[str]) -> Callable[[Parameters], Sequence[Any]]:
    """Takes the values of these names, in their order."""
    return itemgetter(*names) if len(names) > 1 else lambda parameters: [parameters[name] for name in names]


def _as_it_is(value: Any) -> Any:
    return value


def _into(type_: TypeEngine[Any], dialect: Dialect) -> Convert:
    return type_.dialect_impl(dialect).bind_processor(dialect) or _as_it_is


def _out_of(type_: TypeEngine[Any], dialect: Dialect, code: Any) -> Convert | None:
    return type_.dialect_impl(dialect).result_processor(dialect, code)
