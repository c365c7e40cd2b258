"""A finding of the doctor: one line, and how serious it is. Data."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Mark"]


class Mark(Enum):
    """How serious it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    mark: Mark
    text: str
