"""Writes a migration from the newest one to the tables as they are in the code.

    python scripts/new_migration.py "goals get a due date"

It compares against a throw-away SQLite database; read what it wrote, then run the tests on both databases.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from adapters.sql.schema import migrate, new_revision


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("message", help="what the migration does")
    message = parser.parse_args().message
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'schema.db'}"
        migrate(url)
        new_revision(url, message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
