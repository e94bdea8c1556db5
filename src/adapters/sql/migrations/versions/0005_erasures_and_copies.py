"""erasures, legal holds, and what providers keep."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_IS_DUE = sa.text("due IS NOT NULL")
_OPEN = sa.text("user_id IS NOT NULL")


def upgrade() -> None:
    """Brings the schema here. What providers keep of each thread moves into a table of its own."""
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=128), nullable=True),
        sa.Column("user_hash", sa.String(length=64), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("erased", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasures")),
    )
    op.create_index(
        "uq_erasures_open", "erasures", ["user_id"], unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN
    )
    copies = op.create_table(
        "copies",
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("ref", sa.String(length=255), nullable=False),
        sa.Column("thread_id", sa.String(length=36), nullable=False),
        sa.Column("due", sa.DateTime(timezone=True), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("provider", "ref", name=op.f("pk_copies")),
    )
    op.create_index("ix_copies_thread", "copies", ["thread_id"])
    op.create_index("ix_copies_due", "copies", ["due"], sqlite_where=_IS_DUE, postgresql_where=_IS_DUE)
    op.add_column("users", sa.Column("held_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "tombstones", sa.Column("erasure_id", sa.String(length=36), server_default=sa.text("''"), nullable=False)
    )
    op.create_index("ix_tombstones_erasure", "tombstones", ["erasure_id"])

    connection = op.get_bind()
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def note(thread_id: str, provider: str, refs: Any, due: Any) -> None:
        for ref in refs:
            row = {"provider": provider, "ref": ref, "thread_id": thread_id, "due": due}
            found[provider, ref] = {**row, "tries": 0, "reason": ""}

    threads = sa.text(
        "SELECT id, thread_id, provider_state FROM assistant_threads WHERE provider_state IS NOT NULL"
    )
    for thread_id, conversation_id, raw in connection.execute(threads):
        state = _loaded(raw)
        if state is not None:
            refs = filter(None, (conversation_id, state.get("response_id"), *state.get("retired", ())))
            note(thread_id, state["provider"], refs, None)
    graves: Any = sa.select(
        sa.column("thread_id"),
        sa.column("provider"),
        sa.column("copies"),
        sa.column("deleted_at", sa.DateTime(timezone=True)),
    ).select_from(sa.table("tombstones"))
    for thread_id, provider, raw, deleted_at in connection.execute(graves):
        note(thread_id, provider, _loaded(raw) or (), deleted_at)
    if found:
        op.bulk_insert(copies, list(found.values()))

    op.drop_column("tombstones", "copies")
    op.drop_column("tombstones", "provider")
    op.drop_column("tombstones", "user_id")


def downgrade() -> None:
    """Takes it back, with every receipt, every hold and what is known of copies at providers."""
    for name, length in (("user_id", 128), ("provider", 64)):
        op.add_column(
            "tombstones", sa.Column(name, sa.String(length=length), server_default=sa.text("''"), nullable=False)
        )
    op.add_column("tombstones", sa.Column("copies", sa.JSON(), server_default=sa.text("'[]'"), nullable=False))
    op.drop_index("ix_tombstones_erasure", table_name="tombstones")
    op.drop_column("tombstones", "erasure_id")
    op.drop_column("users", "held_since")
    op.drop_table("copies")
    op.drop_table("erasures")


def _loaded(value: Any) -> Any:
    """JSON as the driver gives it: read already, or as text."""
    return json.loads(value) if isinstance(value, str) else value
