"""What a method of quantisation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svl.core import Method

if TYPE_CHECKING:
    from svl.models.lvlm import Lvlm


@dataclass(frozen=True)
class Quantization(Method, ABC):
    """In which precision weights are kept. It acts on the model that is left after pruning and compensation."""

    @abstractmethod
    def apply(self, lvlm: Lvlm) -> Lvlm:
        """The model with quantised weights, on the same device; called once for every model that is evaluated.

        A copy that shares the tensors that do not change: `lvlm` stays as it is, with its layers and its anatomy.

        Raises:
            SvlError: if that is not possible for this model or on its device.
        """
