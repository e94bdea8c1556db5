"""The packages that only the bench needs, in an environment of their own: `make bench` sets it up."""

from __future__ import annotations

import sys
from pathlib import Path

from speed.upstream import ROOT

FOLDER = ROOT / ".bench-venv"
WHY = FOLDER / "why-not"
"""Where `make bench` leaves the reason if they could not be installed."""


def missing() -> str | None:
    """Why there are none; None if they are there."""
    if (FOLDER / "bench.stamp").exists():
        return None
    lines = WHY.read_text(errors="replace").strip().splitlines() if WHY.exists() else []
    return lines[-1] if lines else "make bench sets it up"


def python() -> Path:
    """The interpreter that has them."""
    return FOLDER / "bin" / "python"


def add() -> None:
    """Lets this process import them, behind what it has itself."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sys.path.append(str(FOLDER / "lib" / version / "site-packages"))
