"""The repositories, each on one session. Statements are built once, at import: only their parameters change."""

from adapters.sql.repositories.agents import AgentVersions
from adapters.sql.repositories.erasures import Copies, Erasures
from adapters.sql.repositories.goals import Goals
from adapters.sql.repositories.leases import Leases
from adapters.sql.repositories.ledger import Ledger
from adapters.sql.repositories.messages import Messages
from adapters.sql.repositories.threads import Threads, Users
from adapters.sql.repositories.turn_log import TurnLog
from adapters.sql.repositories.turns import Turns

__all__ = [
    "AgentVersions",
    "Copies",
    "Erasures",
    "Goals",
    "Leases",
    "Ledger",
    "Messages",
    "Threads",
    "TurnLog",
    "Turns",
    "Users",
]
