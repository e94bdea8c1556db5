"""Files that somebody may replace while we run."""

from pathlib import Path


def stamp(file: Path | None) -> tuple[int, int, int] | None:
    """Changes when the file does; None where there is none. Costs a system call and never raises."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else None
