"""attachments."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema here."""
    op.create_table(
        "attachments",
        sa.Column("turn_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"], name=op.f("fk_attachments_turn_id")),
        sa.PrimaryKeyConstraint("turn_id", "number", name=op.f("pk_attachments")),
    )


def downgrade() -> None:
    """Takes it back, with every image and file."""
    op.drop_table("attachments")
