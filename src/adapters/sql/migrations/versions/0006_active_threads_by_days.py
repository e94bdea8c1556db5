"""SQLite: active threads are kept by the days of their newest messages."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_IS_ACTIVE = sa.text("is_active = 1")


def upgrade() -> None:
    """Brings the schema here."""
    if op.get_bind().dialect.name != "sqlite":
        return
    op.drop_index("ix_assistant_threads_active", "assistant_threads")
    op.create_index(
        "ix_assistant_threads_active_days",
        "assistant_threads",
        [sa.text("substr(last_message_at, 1, 10)")],
        sqlite_where=_IS_ACTIVE,
    )


def downgrade() -> None:
    """Takes it back."""
    if op.get_bind().dialect.name != "sqlite":
        return
    op.drop_index("ix_assistant_threads_active_days", "assistant_threads")
    op.create_index(
        "ix_assistant_threads_active", "assistant_threads", ["last_message_at", "id"], sqlite_where=_IS_ACTIVE
    )
