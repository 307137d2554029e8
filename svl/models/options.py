"""What a checkpoint is loaded with: said once, for loading, offloading, export and configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError, did_you_mean, one_of

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is read.

    Attributes:
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        device: auto (the first accelerator, else the CPU), or a torch device.
        revision: hub branch, tag or commit.
        layers: dotted path of the decoder layers, where structure does not tell.
        image_token: the image placeholder or its id, where config and processor do not tell.
        protect: layers that must stay: auto (those whose removal would change what others do), none, or a tuple.
        name: what plans and reports call the model; None: the last part of its path.
        trust_remote_code: run model code from the checkpoint.

    Raises:
        SvlError: if `dtype` or `protect` is none of these.
    """

    dtype: str = "auto"
    device: str = "auto"
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
