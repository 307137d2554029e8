"""The projector alone: what brings visual features to the decoder is trained on answers, the decoder is not.

After arXiv 2604.24380, which finds this sufficient where few layers go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from svl.core import SvlError
from svl.recovery.base import Parts, Recovery
from svl.recovery.modules import projector_tensors

if TYPE_CHECKING:
    from svl.core import Plan
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class Projector(Recovery):
    """Train the projector.

    Attributes:
        modules: dotted paths of its modules, where their names do not tell.
    """

    modules: tuple[str, ...] = ()

    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        """All parameters of the projector.

        Raises:
            SvlError: if the model has none, or it is not found.
        """
        if not pruned.takes_images and not self.modules:
            raise SvlError(f"'{pruned.name}' takes no images, so it has no projector to train; choose recovery=lora")
        if not (tensors := projector_tensors(pruned, self.modules)):
            raise SvlError(
                f"the projector of '{pruned.name}' is not found: name its modules with recovery.modules=[..]"
            )
        return Parts(tensors)
