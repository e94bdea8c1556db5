"""turns wait in their threads; leases; tombstones."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_AT_WORK = sa.text("state IN ('running', 'waiting_for_client')")
_ACCEPTED = sa.text("state = 'accepted'")
_UNFINISHED = sa.text("state IN ('accepted', 'running', 'waiting_for_client')")
_QUESTION_OR_REPLY = sa.text("role IN ('user', 'assistant')")
_QUESTION = sa.text("role = 'user'")
_REPLY = sa.text("role = 'assistant'")


def upgrade() -> None:
    """Brings the schema here."""
    op.create_table(
        "leases",
        sa.Column("owner", sa.String(length=36), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_leases")),
    )
    op.create_table(
        "tombstones",
        sa.Column("thread_id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("copies", sa.JSON(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("thread_id", name=op.f("pk_tombstones")),
    )
    op.drop_index("uq_messages_one_assistant", table_name="messages")
    op.drop_index("uq_messages_one_user", table_name="messages")
    op.create_index("ix_messages_turn", "messages", ["turn_id"], unique=False)
    op.create_index(
        "uq_messages_question_and_reply",
        "messages",
        ["turn_id", "role"],
        unique=True,
        sqlite_where=_QUESTION_OR_REPLY,
        postgresql_where=_QUESTION_OR_REPLY,
    )
    op.add_column("turns", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("turns", sa.Column("place", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("turns", sa.Column("waiting", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("turns", sa.Column("continuation", sa.JSON(none_as_null=True), nullable=True))
    op.drop_index("ix_turns_unfinished", table_name="turns")
    op.drop_index("ix_turns_thread", table_name="turns")
    op.create_index("ix_turns_thread", "turns", ["thread_id", "state", "place"], unique=False)
    op.create_index(
        "ix_turns_held", "turns", ["owner"], unique=False, sqlite_where=_AT_WORK, postgresql_where=_AT_WORK
    )
    op.create_index(
        "ix_turns_waiting",
        "turns",
        ["accepted_at"],
        unique=False,
        sqlite_where=_ACCEPTED,
        postgresql_where=_ACCEPTED,
    )
    # Until now a turn was claimed where it was accepted, or not at all.
    op.execute("UPDATE turns SET claimed_at = accepted_at WHERE state <> 'accepted'")


def downgrade() -> None:
    """Takes it back."""
    op.drop_index("ix_turns_waiting", table_name="turns")
    op.drop_index("ix_turns_held", table_name="turns")
    op.create_index(
        "ix_turns_unfinished",
        "turns",
        ["accepted_at"],
        unique=False,
        sqlite_where=_UNFINISHED,
        postgresql_where=_UNFINISHED,
    )
    op.drop_index("ix_turns_thread", table_name="turns")
    op.create_index("ix_turns_thread", "turns", ["thread_id"], unique=False)
    op.drop_column("turns", "continuation")
    op.drop_column("turns", "waiting")
    op.drop_column("turns", "place")
    op.drop_column("turns", "claimed_at")
    op.drop_index("uq_messages_question_and_reply", table_name="messages")
    op.drop_index("ix_messages_turn", table_name="messages")
    for name, role in (("uq_messages_one_user", _QUESTION), ("uq_messages_one_assistant", _REPLY)):
        op.create_index(name, "messages", ["turn_id"], unique=True, sqlite_where=role, postgresql_where=role)
    op.drop_table("tombstones")
    op.drop_table("leases")
