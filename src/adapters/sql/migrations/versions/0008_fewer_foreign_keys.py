"""PostgreSQL: no foreign keys where each row written would read and lock another to no purpose."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_KEYS = [
    ("assistant_threads", "assistant_id", "agents"),
    ("turns", "agent_id", "agents"),
    ("messages", "thread_id", "assistant_threads"),
    ("turn_log", "turn_id", "turns"),
]


def upgrade() -> None:
    """Brings the schema here."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, column, _ in _KEYS:
        op.drop_constraint(f"fk_{table}_{column}", table)


def downgrade() -> None:
    """Takes it back."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, column, other in _KEYS:
        op.create_foreign_key(f"fk_{table}_{column}", table, other, [column], ["id"])
