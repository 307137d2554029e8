"""No compensation: kept layers stay bit-identical.

Cost: no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from svl.core import Compensation, HiddenStates, Patch, Plan


@dataclass(frozen=True)
class NoCompensation(Compensation):
    """Leave the gap as it is."""

    does_nothing: ClassVar[bool] = True

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """The empty patch."""
        return Patch()
