"""Short-LVLM: training-free layer pruning for large vision-language models.

The Python API is the pipeline's own stages; they are imported on first use, so that `import svl` is cheap:

    from svl.calibrate import calibrate

    lvlm = svl.load("path-or-hub-id")
    stats = calibrate(lvlm, svl.read_samples("calibration.parquet"))
    ...  # the README has the rest
"""

import logging
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# torchao, which transformers imports wherever it is installed, makes torch warn of a call that it no longer needs.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

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


class _OnTransformers:
    """Finder that lets transformers' Auto classes know the ports of svl.models, as soon as transformers is imported.

    Doing so at once would make `import svl` take as long as importing transformers and torch.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of transformers, which registers the ports when it is executed; None for all other modules."""
        if name != "transformers":
            return None
        spec = next((s for f in sys.meta_path if f is not cls and (s := f.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)
            import_module("svl.models")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    import_module("svl.models")
else:
    sys.meta_path.insert(0, _OnTransformers)
