"""What the doctor says: one line, and how bad it is. Data."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Mark"]


class Mark(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    mark: Mark
    text: str
