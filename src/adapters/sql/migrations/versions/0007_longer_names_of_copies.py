"""longer names of copies: gateways wrap a provider's ids, more than once."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema here."""
    _resize(255, 1_024)


def downgrade() -> None:
    """Takes it back. PostgreSQL refuses that while there is a longer name."""
    _resize(1_024, 255)


def _resize(before: int, after: int) -> None:
    with op.batch_alter_table("copies") as copies:
        copies.alter_column(
            "ref", existing_type=sa.String(length=before), type_=sa.String(length=after), existing_nullable=False
        )
