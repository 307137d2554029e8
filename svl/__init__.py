"""Short-LVLM: training-free layer pruning for large vision-language models.

The Python API is the pipeline's own stages. Names are imported on first use, so that `import svl` is cheap:

    import svl

    lvlm = svl.load("path-or-hub-id")
    stats = svl.calibrate(lvlm, svl.read_samples("calibration.parquet"))
    ...  # the README has the rest
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "Activations": "calibration.activations",
    "Angular": "strategies.angular",
    "Cosine": "strategies.cosine",
    "Linear": "compensation.linear",
    "Lvlm": "models.lvlm",
    "Patch": "core",
    "Plan": "core",
    "Refit": "compensation.refit",
    "Runs": "strategies.runs",
    "Stats": "core",
    "Subspace": "compensation.subspace",
    "SvlError": "core",
    "Tis": "selectors.tis",
    "apply": "pruning.surgery",
    "calibrate": "calibration.calibrate",
    "load": "models.loading",
    "read_samples": "data.sample_files",
    "save": "checkpoints.export",
    "select": "calibration.calibrate",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"svl.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'svl' has no attribute {name!r}")
