"""Any Hugging Face vision-language (or text-only) model, and where its decoder layers are.

Everything structural is in `Anatomy`, found by looking at the model, never at its name. What structure cannot tell is
an error that asks for `model.layers`, not a guess: a scan that falls back to "some list of layers" finds the vision
tower sooner or later.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from svl.core import SvlError, one_of

log = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Paths that hold layer stacks of their own which are not the language decoder.
NOT_DECODER = ("vision", "visual", "image", "audio", "qformer", "perceiver", "resampler", "merger", "abstractor")
# Projections that write into the residual stream, by role; names as used across Hugging Face decoders.
WRITERS = {
    "attn": ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense"),
    "mlp": ("mlp.down_proj", "mlp.dense_4h_to_h", "fc2"),
}
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are that pruning touches.

    Attributes:
        layers: dotted path of the decoder layers' ModuleList.
        n_layers: its length.
        hidden_size: width d of the residual stream.
        image_token_id: id of the placeholder that visual features replace; None for text-only models.
        writers: role ("attn", "mlp") -> path of that projection within a layer, where every layer has it.
        protected: layers that must stay.
    """

    layers: str
    n_layers: int
    hidden_size: int
    image_token_id: int | None
    writers: dict[str, str]
    protected: tuple[int, ...] = ()

    @property
    def removable(self) -> tuple[int, ...]:
        """Layers that may be removed."""
        return tuple(i for i in range(self.n_layers) if i not in self.protected)


@dataclass(frozen=True)
class Lvlm:
    """A model, its processor (a tokenizer for text-only models) and its anatomy."""

    model: Any
    processor: Any
    anatomy: Anatomy
    name: str = "model"

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.model.get_submodule(self.anatomy.layers)

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self.anatomy.image_token_id is not None

    def render(self, conversation: list[dict[str, Any]]) -> str:
        """Messages (content: a list of image and text parts) in the model's own chat template, ready for the answer.

        A model without a template gets the plain text.

        Raises:
            SvlError: if there is an image and no template says where it goes.
        """
        template = getattr(self.processor, "chat_template", None)
        if template is None and any(part["type"] == "image" for m in conversation for part in m["content"]):
            raise SvlError(f"model '{self.name}' has no chat template, so an image cannot be placed in its prompt")
        if not self.sees:  # templates of text models expect strings
            conversation = [{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in conversation]
        if template is None:
            return "\n".join(text for m in conversation for text in _texts(m["content"]))
        return self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    def prompt(self, text: str, image: bool) -> str:
        """One user turn of text, after an image if there is one, as `render` gives it.

        Raises:
            SvlError: if the text holds the model's own mark of an image.
        """
        mark = self.tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id) if self.sees else None
        if mark and mark in text:
            raise SvlError(f"the prompt '{text[:60]}' contains {mark}; leave it out: the template places the image")
        parts = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        return self.render([{"role": "user", "content": parts}])

    def encode(self, texts: list[str], images: list[Any] | None = None) -> dict[str, Tensor]:
        """Model inputs for prompts and their images, padded on the left, on the model's device."""
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        bos = tokenizer.bos_token
        special = not (bos and all(t.startswith(bos) for t in texts))  # a template may have written it already
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": special}
        pictures = {"images": images} if images else {}
        inputs = self.processor(text=texts, **pictures, **options)
        return {
            k: v.to(self.device, self.model.dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in inputs.items()
        }

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def find_anatomy(model: Any, layers: str | None = None) -> Anatomy:
    """Locate decoder layers, image token and residual writers by structure; `layers` names the ModuleList instead.

    Raises:
        SvlError: if no list of decoder layers is found, or several are and `layers` does not choose.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not n_layers or not hidden:
        raise SvlError(f"{type(model).__name__} has no decoder layers: its text config gives no depth or width")
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers}
    if layers is not None:
        if layers not in lists:
            raise SvlError(f"model.layers='{layers}' is no list of {n_layers} layers; candidates: {', '.join(lists)}")
        found = [layers]
    else:
        outside = [n for n in lists if not any(word in n.lower() for word in NOT_DECODER)]
        found = [n for n in outside if _writers(lists[n], hidden)]
    if len(found) != 1:
        what = "several lists of decoder layers" if found else "no decoder layers"
        candidates = ", ".join(found or outside)
        raise SvlError(
            f"found {what} in {type(model).__name__} ({n_layers} layers of width {hidden} expected)"
            + (f"; if it is one of {candidates}, choose it with model.layers=" if candidates else "")
        )
    image = next((v for f in IMAGE_TOKEN_FIELDS if isinstance(v := getattr(model.config, f, None), int)), None)
    # DeepStack models add the i-th of these visual features after decoder layer i, by its position alone.
    injected = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return Anatomy(found[0], n_layers, hidden, image, _writers(lists[found[0]], hidden), tuple(range(len(injected))))


def _writers(layers: nn.ModuleList, hidden: int) -> dict[str, str]:
    """Role -> path of the projections that all `layers` have and that give vectors of width `hidden`."""
    found = {}
    for role, names in WRITERS.items():
        for name in names:
            try:
                modules = [layer.get_submodule(name) for layer in layers]
            except AttributeError:
                continue
            if all(isinstance(w := getattr(m, "weight", None), Tensor) and len(w) == hidden for m in modules):
                found[role] = name
                break
    return found


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    layers: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> Lvlm:
    """Load a checkpoint folder or hub id, image-text or text-only, for inference.

    Args:
        path: folder with a `config.json`, or a hub id.
        dtype: one of auto (as stored), float32, bfloat16, float16.
        device: `auto` (first accelerator, else cpu), or a torch device.
        revision: hub branch, tag or commit.
        layers: dotted path of the decoder layers, where structure does not tell.
        name: what plans and reports call the model; default: the last part of `path`.
        trust_remote_code: run model code from the checkpoint.

    Raises:
        SvlError: if the path is missing, holds no model, an incomplete one, or one without decoder layers.
    """
    one_of("model.dtype", dtype, tuple(DTYPES))
    path = os.path.expanduser(path)
    if path.startswith((".", "/")) and not os.path.isdir(path):
        raise SvlError(f"model.path: there is no folder '{path}'")
    return _load(path, dtype, device, revision, layers, name or Path(path).name, trust_remote_code)


def describe(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The config of a checkpoint, and the transformers class (AutoModelFor...) that makes its model.

    Raises:
        SvlError: if there is no readable config, or its model has no decoder layers to prune.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise SvlError(f"cannot load a model from '{path}': {str(error).splitlines()[0]}") from error
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    if not sees and (type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder):
        raise SvlError(f"'{path}' is a {config.model_type} model, which has no decoder layers to prune")
    return config, AutoModelForImageTextToText if sees else AutoModelForCausalLM


@lru_cache(maxsize=1)  # jobs of a sweep share the dense model: surgery never changes it
def _load(path: str, dtype: str, device: str, revision: str | None, layers: str | None, name: str, trust: bool) -> Lvlm:
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    config, auto = describe(path, revision, trust)
    sees = auto is AutoModelForImageTextToText
    try:
        model, info = auto.from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True, **source)
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(path, **source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SvlError(f"cannot load a model from '{path}': {str(error).splitlines()[0]}") from error
    anatomy = find_anatomy(model, layers)
    if sees and anatomy.image_token_id is None:  # going on would treat it as a text model
        raise SvlError(f"{config.model_type} models take images, but where in their prompts is not known")
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise SvlError(f"the checkpoint '{path}' lacks {len(missing)} weights, {missing[0]} for one")
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        model = nn.Module.to(model, torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise SvlError(f"cannot use model.device='{device}': {str(error).splitlines()[0]}") from error
    lvlm = Lvlm(model, processor, anatomy, name)
    log.info("loaded %s: %d decoder layers, %.1f M parameters", name, anatomy.n_layers, lvlm.parameters() / 1e6)
    return lvlm
