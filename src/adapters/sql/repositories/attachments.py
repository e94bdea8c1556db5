"""The bytes of images and files, for the repositories of the messages that they belong to."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import bindparam, delete, exists, insert, select

from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository, each_of
from adapters.sql.statement import Statement
from core.model.attachment import data_of
from core.model.message import ContentPart

_c = t.attachments.c
_turn_id = bindparam("of_turn", type_=_c.turn_id.type)

_ADD = Statement(insert(t.attachments).inline())
_OF = {
    dialect: Statement(select(t.attachments).where(_c.turn_id.in_(ids)))
    for dialect, ids in each_of("turns").items()
}
_DROP_UNUSED = Statement(
    delete(t.attachments).where(_c.turn_id == _turn_id, ~exists().where(t.messages.c.turn_id == _c.turn_id))
)


class Attachments(Repository):
    """`attachments`."""

    def add(self, turn_id: str, content: tuple[ContentPart, ...]) -> None:
        """Stores the bytes in a content. Runs nothing where there are none."""
        for number, data in data_of(content).items():
            self._session.run(_ADD, {"turn_id": turn_id, "number": number, "data": data})

    def of(self, turn_ids: Sequence[str]) -> Mapping[str, Mapping[int, bytes]]:
        """What these turns have, by the number of its part, in one statement. Runs none for no turns."""
        found: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
        if turn_ids:
            statement = _OF[self._session.dialect.name]
            for row in self._session.rows(statement, {"turns": json.dumps(turn_ids)}):
                found[row.turn_id][row.number] = row.data
        return found

    def drop_unused(self, turn_id: str) -> None:
        """Deletes what belongs to a message that has not come into the transcript, and never will."""
        self._session.run(_DROP_UNUSED, {"of_turn": turn_id})
