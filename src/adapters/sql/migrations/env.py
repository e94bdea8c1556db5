"""Alembic's environment. Runs on the connection that `adapters.sql.schema` hands over."""

from typing import Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

from adapters.sql.schema import having_dialect
from adapters.sql.tables import UtcDateTime, metadata


def _render(kind: str, item: object, _: AutogenContext) -> str | Literal[False]:
    """Writes our own types as the ones they stand for, so that migrations depend on nothing of ours."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_item=_render,
    include_object=having_dialect(connection.dialect.name),
    transactional_ddl=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
