"""No compensation: kept layers stay bit-identical."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Hidden, Patch, Plan


@dataclass(frozen=True)
class NoCompensation:
    """Leave the gap as it is."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """The empty patch."""
        return Patch()
