"""Goals: what a user has set out to do in a domain."""

from dataclasses import dataclass
from datetime import date, datetime

from core.model.agent import Domain

MAX_GOAL = 500
"""Code points of a goal, and of its commitment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal and, where given, the next step that the user commits to and the day it is due."""

    id: str
    user_id: str
    domain: Domain
    text: str
    commitment: str
    due: date | None
    created_at: datetime
