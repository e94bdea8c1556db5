"""usage: the ledger, with what the turns on record have cost."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_HAS_NOT_ENDED = sa.text("state IN ('accepted', 'running', 'waiting_for_client')")
_DAY = {
    "sqlite": "date(coalesce(finished_at, accepted_at))",
    "postgresql": "(coalesce(finished_at, accepted_at) AT TIME ZONE 'UTC')::date",
}


def upgrade() -> None:
    """Brings the schema here."""
    op.create_table(
        "usage",
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("agent_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("turns", sa.BigInteger(), nullable=False),
        sa.Column("unmetered_turns", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_write_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "day", "agent_id", "model", "slot", name=op.f("pk_usage")),
    )
    op.add_column(
        "turns", sa.Column("cache_write_tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
    op.create_index(
        "ix_turns_of_user", "turns", ["user_id"], sqlite_where=_HAS_NOT_ENDED, postgresql_where=_HAS_NOT_ENDED
    )
    # Whether the provider had said all that they cost was not noted: of a reply that came whole at once it had.
    op.execute(
        f"""
        INSERT INTO usage
        SELECT user_id, {_DAY[op.get_bind().dialect.name]}, agent_id, model, 0, count(*),
               sum(CASE WHEN claimed_at IS NULL OR (state = 'completed' AND attempt = 1) THEN 0 ELSE 1 END),
               sum(input_tokens), sum(cached_input_tokens), 0, sum(output_tokens), sum(reasoning_tokens)
        FROM turns WHERE NOT ({_HAS_NOT_ENDED.text})
        GROUP BY 1, 2, 3, 4
        """  # noqa: S608 - constants
    )


def downgrade() -> None:
    """Takes it back, with what only the ledger knows: the cost of deleted threads."""
    op.drop_index("ix_turns_of_user", "turns", sqlite_where=_HAS_NOT_ENDED, postgresql_where=_HAS_NOT_ENDED)
    op.drop_column("turns", "cache_write_tokens")
    op.drop_table("usage")
