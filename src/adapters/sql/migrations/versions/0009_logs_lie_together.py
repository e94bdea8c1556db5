"""SQLite: the rows of a turn's log lie beside each other, not where they came in among those of all turns."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Brings the schema here."""
    _recreate(with_rowid=False)


def downgrade() -> None:
    """Takes it back."""
    _recreate(with_rowid=True)


def _recreate(*, with_rowid: bool) -> None:
    if op.get_bind().dialect.name != "sqlite":
        return
    with op.batch_alter_table(
        "turn_log",
        recreate="always",
        reflect_kwargs={"resolve_fks": False},
        table_kwargs={"sqlite_with_rowid": with_rowid},
    ):
        pass  # only the table's kind changes
