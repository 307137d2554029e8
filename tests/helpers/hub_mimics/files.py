"""What the mimics' folders are made of: JSON files, tokenizers of the kinds that the hub has, weights in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.families import randomise
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = 4 * [
    "What colour is the shape? Answer the question using a single word or phrase.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: \nASSISTANT:",
    "red green blue yellow circle square left right above below",
]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESCALE = 0.00392156862745098
HALF = [0.5, 0.5, 0.5]

Names = dict[str, int]


def write_json(folder: Path, **files: Any) -> None:
    """Write `config={...}` as config.json, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))


def _added(ids: Names) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(i): {"content": token, **flags} for token, i in ids.items()}


def sentencepiece_like(
    folder: Path, special: Sequence[str], added: Sequence[str], bos: str, **settings: Any
) -> tuple[Names, int]:
    """As the tokenizer.json of Llama and Gemma: BPE with byte fallback, blanks as "▁".

    Args:
        folder: where tokenizer.json and tokenizer_config.json go.
        special: the first tokens of the vocabulary.
        added: tokens behind the vocabulary's last.
        bos: the one of `special` before every text.
        settings: of tokenizer_config.json, besides the usual ones; None leaves one out.

    Returns:
        ids of `special` and `added`, size of the vocabulary.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[*special, *byte_tokens], show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens(list(added))
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    ids = {token: core.token_to_id(token) for token in (*special, *added)}
    usual = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": _added(ids), "bos_token": bos,
        "clean_up_tokenization_spaces": False, "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>", "sp_model_kwargs": {}, "unk_token": "<unk>", "use_default_system_prompt": False,
    }  # fmt: skip
    chosen = {name: value for name, value in {**usual, **settings}.items() if value is not None}
    shown = ("bos_token", "eos_token", "unk_token", "pad_token")
    write_json(folder, tokenizer_config=chosen, special_tokens_map={name: chosen[name] for name in shown})
    return ids, core.get_vocab_size()


def byte_level(folder: Path, added: Sequence[str], **settings: Any) -> tuple[Names, int]:
    """As the tokenizer files of Qwen and GPT-2: BPE of bytes, vocab.json, merges.txt; see `sentencepiece_like`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    ids = {token: core.token_to_id(token) for token in added}
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    usual = {
        "add_prefix_space": False, "added_tokens_decoder": _added(ids), "bos_token": None,
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 32768,
        "split_special_tokens": False, "unk_token": None, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    write_json(folder, vocab=model["vocab"], tokenizer_config={**usual, **settings})
    return ids, core.get_vocab_size()


def write_weights(
    folder: Path, dtype: torch.dtype, renamed: Callable[[str], str | None], shards: int = 2, pickled: bool = False
) -> None:
    """Random weights for the folder's config.json, in shards, under the names that `renamed` gives (None: left out)."""
    model = randomise(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)))
    named = ((renamed(name), tensor) for name, tensor in model.state_dict().items())
    state = {name: tensor.to(dtype).contiguous().clone() for name, tensor in named if name}
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = dict(list(state.items())[number::shards])
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def renaming(*pairs: tuple[str, str], left_out: Iterable[str] = ()) -> Callable[[str], str | None]:
    """Names of today's transformers -> names on disk: prefixes replaced, some tensors left out."""

    def renamed(name: str) -> str | None:
        if name in left_out:
            return None
        for new, old in pairs:
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    return renamed


IN_PARTS = (  # checkpoints of before transformers 4.52 have the decoder as a model of its own
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
UNTIED = renaming(*IN_PARTS, ("lm_head.", "language_model.lm_head."))
TIED = renaming(*IN_PARTS, left_out=["lm_head.weight"])


def as_stored(name: str) -> str:
    """The same name."""
    return name
