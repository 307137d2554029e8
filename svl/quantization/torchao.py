"""Quantised weights of the decoder layers, by torchao (https://github.com/pytorch/ao).

Weight-only int8, the default, keeps one scale per output channel, needs no data and runs on CPU, too. What is left of
the decoder after pruning and compensation is quantised; vision tower, projector, embeddings and head stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from svl.core import Plan, SvlError, one_of
from svl.models.lvlm import Lvlm
from svl.pruning import surgery
from svl.quantization.base import Quantization


@dataclass(frozen=True)
class Torchao(Quantization):
    """A configuration of torchao.

    Attributes:
        config: name of a class of `torchao.quantization`, such as Int8WeightOnlyConfig.
        options: its arguments.
    """

    config: str = "Int8WeightOnlyConfig"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._configured()

    def _configured(self) -> Any:
        try:
            from torchao import quantization
        except ImportError as error:
            raise SvlError("this quantization needs torchao: pip install 'svl[compat]'") from error
        one_of("quantization.config", self.config, sorted(n for n in dir(quantization) if n.endswith("Config")))
        try:
            return getattr(quantization, self.config)(**self.options)
        except (TypeError, ValueError, AssertionError) as error:
            raise SvlError(f"quantization.options do not fit {self.config}: {error}") from error

    def apply(self, lvlm: Lvlm) -> Lvlm:
        """A copy of the model with quantised decoder layers; `lvlm` stays as it is, and shares all other tensors.

        Raises:
            SvlError: if torchao cannot do this with these layers on this device.
        """
        from torchao.quantization import quantize_

        copied = surgery.apply(lvlm, Plan(lvlm.anatomy.n_layers, ()))
        try:
            quantize_(copied.layers, self._configured())
        except Exception as error:
            raise SvlError(f"{self.config} does not work on '{lvlm.name}' on {lvlm.device.type}: {error}") from error
        return copied
