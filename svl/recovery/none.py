"""No recovery: nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from svl.recovery.base import Parts, Recovery

if TYPE_CHECKING:
    from svl.core import Plan
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leave the pruned model as it is."""

    does_nothing: ClassVar[bool] = True

    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        """Nothing."""
        return Parts()
