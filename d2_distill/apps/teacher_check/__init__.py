"""Whether a teacher is good enough to teach: how it does on the user's data, and whether it sees them rightly."""

from __future__ import annotations

from .check import check_teacher
from .verdict import GOOD

__all__ = ["GOOD", "check_teacher"]
