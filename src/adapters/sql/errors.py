"""What can be wrong with a database as a whole."""


class DatabaseFault(Exception):
    """The database can't be used as it is. The text says why and what to do."""


class SchemaTooNewError(DatabaseFault):
    """It was written by a later version of this code, which alone may open it."""

    def __init__(self) -> None:
        super().__init__("the database is newer than this version of vida-coach: run the newer version")


class UnreadableDatabaseError(DatabaseFault):
    """It is no database, or a damaged one. Nothing of it was changed."""

    def __init__(self) -> None:
        super().__init__("VIDA_DATABASE_URL names something that is no database, or a damaged one: check it")


class SchemaOutdatedError(DatabaseFault):
    """A server database must be migrated first."""

    def __init__(self) -> None:
        super().__init__("the database does not have this version's schema: run `vida-coach migrate`")
