"""Short-LVLM: training-free layer pruning for large vision-language models.

The Python API is the pipeline's own stages; they are imported on first use, so that `import svl` is cheap:

    from svl.calibrate import calibrate

    lvlm = svl.load("path-or-hub-id")
    stats = calibrate(lvlm, svl.read_samples("calibration.parquet"))
    ...  # the README has the rest
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Plan": "core",
    "Patch": "core",
    "SvlError": "core",
    "load": "loading",
    "Lvlm": "loading",
    "read_samples": "data",
    "apply": "surgery",
    "save": "export",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"svl.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'svl' has no attribute {name!r}")
