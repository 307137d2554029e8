"""What a checkpoint is loaded with: said once, for loading, offloading, export and configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError, did_you_mean, one_of

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # ways of transformers to make a device map


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is read.

    Attributes:
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        device: auto (the first accelerator, else the CPU), or a torch device.
        device_map: instead of one device, several: how transformers is to spread the weights (auto, balanced,
            balanced_low_0, sequential), or where modules go, by name: numbers of accelerators, devices, cpu, disk.
        max_memory: what a device may take of it, such as {0: 20GiB, cpu: 60GiB}; what is left out is found out.
        attn_implementation: auto (transformers' choice), sdpa, eager or flash_attention_2.
        revision: hub branch, tag or commit.
        layers: dotted path of the decoder layers, where structure does not tell.
        image_token: the image placeholder or its id, where config and processor do not tell.
        protect: layers that must stay: auto (those whose removal would change what others do), none, or a tuple.
        name: what plans and reports call the model; None: the last part of its path.
        trust_remote_code: run model code from the checkpoint.

    Raises:
        SvlError: if a setting is none of these, two of them exclude each other, or one needs what is not installed.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, str | int] | None = field(default=None, hash=False)
    max_memory: dict[str | int, str | int] | None = field(default=None, hash=False)
    attn_implementation: str = "auto"
    revision: str | None = None
    layers: str | None = None
    image_token: int | str | None = None
    protect: str | tuple[int, ...] = "auto"
    name: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, DTYPES)
        if isinstance(self.protect, list):
            object.__setattr__(self, "protect", tuple(self.protect))
        if not isinstance(self.protect, tuple):
            one_of("model.protect", self.protect, ("auto", "none"))
        one_of("model.attn_implementation", self.attn_implementation, ATTENTION)
        if self.attn_implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise SvlError("model.attn_implementation=flash_attention_2 needs the package flash-attn, see its README")
        self._check_placement()

    def _check_placement(self) -> None:
        """Make `device_map` and `max_memory` plain, or raise SvlError."""
        if self.device_map is None:
            if self.max_memory is not None:
                raise SvlError("model.max_memory is read with model.device_map only: set that, for example to auto")
            return
        if self.device != "auto":
            raise SvlError(f"model.device={self.device} names one device, model.device_map several: set one of the two")
        if isinstance(self.device_map, Mapping):
            places = {str(name): _number(place) for name, place in self.device_map.items()}
            object.__setattr__(self, "device_map", places)
        else:
            one_of("model.device_map", self.device_map, SPREADS)
        if self.max_memory is not None:
            if not isinstance(self.max_memory, Mapping):
                raise SvlError(f"model.max_memory is '{self.max_memory}', but must be a mapping such as {{0: 20GiB}}")
            memory = {_number(device): size for device, size in self.max_memory.items()}
            object.__setattr__(self, "max_memory", memory)
        if importlib.util.find_spec("accelerate") is None:
            raise SvlError("model.device_map needs the package accelerate: pip install accelerate")

    @property
    def torch_dtype(self) -> torch.dtype | str:
        """`dtype` as transformers takes it: a torch dtype, or "auto"."""
        import torch  # not above: the command line starts without it

        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)

    def model_name(self, path: str | Path) -> str:
        """What the model at `path` is called."""
        return self.name or Path(path).name

    @classmethod
    def of(cls, options: LoadOptions | None, settings: dict[str, Any]) -> LoadOptions:
        """The options of a call that takes them as an object or one by one.

        Raises:
            SvlError: if both are given, or there is no such setting.
        """
        if options is not None and settings:
            raise SvlError(f"give either options or single settings, not both: {', '.join(settings)}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise SvlError(f"there is no setting '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")
        return options or cls(**settings)


def _number(name: Any) -> Any:
    """The number of an accelerator that a text names, as command lines do; anything else as it is."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name
