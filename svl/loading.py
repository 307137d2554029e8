"""Any Hugging Face vision-language (or text-only) model, and where its decoder layers are.

Everything structural is in `Anatomy`, found by looking at the model, never at its name. What structure cannot tell is
an error that asks for `model.layers`, not a guess: a scan that falls back to "some list of layers" finds the vision
tower sooner or later.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from svl.core import Plan, SvlError, did_you_mean, one_of

log = logging.getLogger(__name__)
Show = Callable[[Iterable[Any], str, int], Iterable[Any]]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Paths that hold layer stacks of their own which are not the language decoder.
NOT_DECODER = ("vision", "visual", "image", "audio", "qformer", "perceiver", "resampler", "merger", "abstractor")
# Parameters of a layer that write into the residual stream, by role; names as used across Hugging Face decoders. Of
# several patterns the first that some parameter fits counts: beside a c_proj, a w2 is no output but a gate.
WRITERS = {
    "attn": (
        re.compile(r"attn\.c_proj\.(weight|bias)"),
        re.compile(r"(self_attn|cross_attn|linear_attn|conv)\.(o_proj|out_proj|dense)\.(weight|bias)"),
    ),
    "mlp": (
        re.compile(r"mlp\.c_proj\.(weight|bias)"),
        re.compile(
            r"((mlp|feed_forward|ffn|experts)\.(.+\.)?)?(down_proj|dense_4h_to_h|fc2|w2)(\.weight|\.bias|_bias)?"
        ),
    ),
}
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "image_patch_id")
# Config fields of models whose layers cannot be taken apart, with the reason.
REFUSED = {
    "altup_num_inputs": "its layers pass on several hidden states at once, of which none is the residual stream",
    "cross_layer_interval": "its cross-attention layers lie between the others at fixed intervals",
    "kv_source_layers": "its layers read keys and values of others by their numbers",
    "deepstack_layer_map": "visual features enter its layers by their numbers",
}
NO_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe")  # kinds of layers that have no attention map
LAST_IS_FULL = ("gemma4_text", "gemma4_unified_text")  # configs that turn their last layer into full attention


@dataclass(frozen=True)
class Writer:
    """What a layer writes into the residual stream in one role ("attn", "mlp"): one projection, or many experts.

    Attributes:
        module: path, within the layer, of the module that gives what is written: the projection itself, or the block
            that mixes several.
        matrices: name, within the layer, of every weight -> whether it is stored as [.., n_in, d], not [.., d, n_in].
        biases: names, within the layer, of biases [d].
    """

    module: str
    matrices: dict[str, bool]
    biases: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether it is one matrix, read and written by `module`."""
        return list(self.matrices) == [f"{self.module}.weight"]


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are that pruning touches.

    Attributes:
        layers: dotted path of the decoder layers' ModuleList.
        n_layers: its length.
        hidden_size: width d of the residual stream.
        image_token_id: id of the placeholder that visual features replace; None for text-only models.
        writers: role ("attn", "mlp") -> the writer of every layer; roles that some layer lacks are missing.
        protected: layer that must stay -> why.
        waived: layers that would be protected, had `model.protect` not decided otherwise.
    """

    layers: str
    n_layers: int
    hidden_size: int
    image_token_id: int | None
    writers: dict[str, tuple[Writer, ...]]
    protected: dict[int, str] = field(default_factory=dict)
    waived: tuple[int, ...] = ()

    @property
    def removable(self) -> tuple[int, ...]:
        """Layers that may be removed."""
        return tuple(i for i in range(self.n_layers) if i not in self.protected)

    def check(self, plan: Plan, name: str, protect: bool = True) -> None:
        """Raise SvlError unless `plan` is for a model of this depth (called `name`) and spares protected layers."""
        if plan.n_layers != self.n_layers:
            raise SvlError(f"the plan is for {plan.n_layers} decoder layers, but '{name}' has {self.n_layers}")
        if protect and (forbidden := sorted(set(plan.removed) & set(self.protected))):
            raise SvlError(
                f"the plan removes layers {forbidden}, which '{name}' needs: {self.protected[forbidden[0]]} "
                "(protect=none removes them all the same)"
            )


@dataclass(frozen=True)
class Lvlm:
    """A model, its processor (a tokenizer for text-only models) and its anatomy."""

    model: Any
    processor: Any
    anatomy: Anatomy
    name: str = "model"

    def must_be_whole(self, what: str) -> None:
        """Raise SvlError if decoder layers are not in memory (`model.offload`), so that `what` is impossible."""
        if any(p.is_meta for p in self.layers.parameters()):
            raise SvlError(f"{what} needs all of '{self.name}' in memory: set model.offload=false, or do without it")

    def map(
        self, work: Callable[[Lvlm, Any], Any], batches: Sequence[Any], show: Show, what: str = ""
    ) -> Iterator[Any]:
        """What `work(lvlm, batch)` gives for every batch, in order; `show` displays progress.

        All work on calibration data goes through here, as a model that does not fit in memory orders it otherwise.
        """
        for batch in show(batches, what, len(batches)):
            yield work(self, batch)

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
        """Messages (content: a list of image and text parts) in the model's own chat template.

        After a user's turn the text is ready for the answer.

        A model without a template gets the plain text.

        Raises:
            SvlError: if there is an image and no template says where it goes.
        """
        template, asks = getattr(self.processor, "chat_template", None), conversation[-1]["role"] != "assistant"
        if template is None and any(part["type"] == "image" for m in conversation for part in m["content"]):
            raise SvlError(f"model '{self.name}' has no chat template, so an image cannot be placed in its prompt")
        if not self.sees:  # templates of text models expect strings
            conversation = [{**m, "content": "\n".join(part["text"] for part in m["content"])} for m in conversation]
        if template is None:
            return "\n".join(text for m in conversation for text in _texts(m["content"]))
        return self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asks)

    def prompt(self, text: str, image: bool, answer: str | None = None) -> str:
        """One user turn of text, after an image if there is one, and its answer, as `render` gives it.

        Raises:
            SvlError: if the text holds the model's own mark of an image.
        """
        mark = self.tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id) if self.sees else None
        if mark and mark in text:
            raise SvlError(f"the prompt '{text[:60]}' contains {mark}; leave it out: the template places the image")
        parts = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        turns = [{"role": "user", "content": parts}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.render(turns)

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

    def place(self, batch_size: int) -> dict[str, Any]:
        """What a speed depends on besides the model."""
        return place(self.device, batch_size)

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def find_anatomy(
    model: Any,
    layers: str | None = None,
    *,
    image_token: int | None = None,
    protect: str | Sequence[int] = "auto",
) -> Anatomy:
    """Locate decoder layers, image token and residual writers by structure.

    Args:
        model: a transformers model; its parameters may lie on the meta device.
        layers: dotted path of the decoder layers, where structure does not tell.
        image_token: id of the image placeholder, where the config does not tell.
        protect: auto (layers whose removal would change what others do), none, or a list of layers.

    Raises:
        SvlError: if no list of decoder layers is found, several are and `layers` does not choose, or layers of such
            a model cannot be removed.
    """
    config = model.config.get_text_config(decoder=True)
    for name, reason in REFUSED.items():
        if getattr(config, name, None) or getattr(model.config, name, None):
            raise SvlError(f"layers of {config.model_type} cannot be removed: {reason} ('{name}')")
    if getattr(config, "is_encoder_decoder", False):
        raise SvlError(f"layers of {config.model_type} cannot be removed: it is an encoder and a decoder")
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
    tied = tied_layers(model.config)
    protected = _protected(protect, tied, n_layers)
    return Anatomy(
        found[0],
        n_layers,
        hidden,
        image_token_id(model.config) if image_token is None else image_token,
        _writers(lists[found[0]], hidden),
        protected,
        tuple(i for i in tied if i not in protected),
    )


def image_token_id(config: Any) -> int | None:
    """The image placeholder that a model's config, or its vision part, names."""
    parts = (config, getattr(config, "vision_config", None))
    values = (getattr(part, field, None) for part in parts for field in IMAGE_TOKEN_FIELDS)
    return next((v for v in values if isinstance(v, int)), None)


def tied_layers(config: Any) -> dict[int, str]:
    """Layers that others depend on in ways that a pruned config cannot express, each with the reason."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or []
    found = {}
    visual = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    for i in range(len(visual)):  # the i-th of these features is added after decoder layer i, by its position alone
        found[i] = "visual features enter after it, by its position (DeepStack)"
    if getattr(text, "num_kv_shared_layers", 0):
        for i, mode in enumerate(text.kv_sharing_modes):
            if mode == "store":
                found[i] = "later layers reuse its keys and values"
    attention = [i for i, kind in enumerate(types) if kind not in NO_ATTENTION]
    if attention and len(attention) < len(types):
        found[attention[-1]] = "it is the last layer with attention, and generation needs one"
    if crossing := getattr(text, "cross_attention_layers", None):
        found[max(crossing)] = "it is the last layer with cross-attention, and images enter nowhere else"
    if text.model_type in LAST_IS_FULL:
        found[len(types) - 1] = "the last layer of such a model has full attention"
    return dict(sorted(found.items()))


def _protected(protect: str | Sequence[int], tied: dict[int, str], n_layers: int) -> dict[int, str]:
    """The layers that must stay, by the setting `model.protect`."""
    if not isinstance(protect, list | tuple):
        one_of("model.protect", protect, ("auto", "none"))
        return tied if protect == "auto" else {}
    if wrong := [i for i in protect if i not in range(n_layers)]:
        raise SvlError(f"model.protect names layers {wrong}, but the model has layers 0..{n_layers - 1}")
    return {i: tied.get(i, "model.protect names it") for i in sorted(protect)}


def _writers(layers: nn.ModuleList, hidden: int) -> dict[str, tuple[Writer, ...]]:
    """Role -> the writer of every layer, for roles that all `layers` have."""
    found = {role: [_writer(layer, names, hidden) for layer in layers] for role, names in WRITERS.items()}
    return {role: tuple(w for w in writers if w) for role, writers in found.items() if all(writers)}


def _writer(layer: nn.Module, patterns: tuple[re.Pattern[str], ...], hidden: int) -> Writer | None:
    """What of `layer` fits `patterns` and writes vectors of width `hidden`; None if nothing does, or in doubt."""
    named = [{n: p for n, p in layer.named_parameters() if names.fullmatch(n)} for names in patterns]
    parameters = next((found for found in named if found), {})
    biases = tuple(n for n, p in parameters.items() if p.ndim == 1)
    matrices: dict[str, bool] = {}
    for name, p in parameters.items():
        if p.ndim > 1:
            flipped = _flipped(layer, name, p, hidden)
            if flipped is None:
                return None
            matrices[name] = flipped
    if not matrices or any(len(parameters[n]) != hidden for n in biases):
        return None
    first = next(iter(matrices))
    alone = len(matrices) == 1 and first.endswith(".weight")
    return Writer(first.removesuffix(".weight") if alone else first.partition(".")[0], matrices, biases)


def _flipped(layer: nn.Module, name: str, p: Tensor, hidden: int) -> bool | None:
    """Whether a weight is stored as [.., n_in, d]; None if it is not of width d, or its shape does not tell."""
    if p.ndim == 2:
        if name.endswith("_bias"):  # of experts, [E, d]: a matrix of E columns, as far as its changes go
            return True if p.shape[1] == hidden else None
        if type(layer.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D":
            return None  # GPT-2's matrices are stored as [n_in, d]
        return False if len(p) == hidden else None
    rows, columns = p.shape[-2] == hidden, p.shape[-1] == hidden
    if rows and columns:  # experts as wide inside as outside: those that feed them tell
        feeding = dict(layer.named_parameters()).get(name.replace("down_proj", "gate_up_proj"))
        if feeding is None:
            return None
        rows, columns = feeding.shape[-1] == hidden, feeding.shape[-2] == hidden
    return columns if rows != columns else None


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    layers: str | None = None,
    image_token: int | str | None = None,
    protect: str | Sequence[int] = "auto",
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
        image_token: the image placeholder or its id, where config and processor do not tell.
        protect: auto (layers whose removal would change what others do), none, or a list of layers.
        name: what plans and reports call the model; default: the last part of `path`.
        trust_remote_code: run model code from the checkpoint.

    Raises:
        SvlError: if the path is missing, holds no model, an incomplete one, or one without decoder layers.
    """
    path = check_source(path, dtype)
    kept = tuple(protect) if isinstance(protect, list | tuple) else protect
    return _load(path, dtype, device, revision, layers, image_token, kept, name or Path(path).name, trust_remote_code)


def check_source(path: str | Path, dtype: str) -> str:
    """The path, as it is to be read; raises SvlError if it is a folder that does not exist, or `dtype` is none."""
    one_of("model.dtype", dtype, tuple(DTYPES))
    path = os.path.expanduser(path)
    if path.startswith((".", "/")) and not os.path.isdir(path):
        raise SvlError(f"model.path: there is no folder '{path}'")
    return path


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
def _load(
    path: str,
    dtype: str,
    device: str,
    revision: str | None,
    layers: str | None,
    image_token: int | str | None,
    protect: str | tuple[int, ...],
    name: str,
    trust: bool,
) -> Lvlm:
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    config, auto = describe(path, revision, trust)
    try:
        model, info = auto.from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True, **source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SvlError(f"cannot load a model from '{path}': {str(error).splitlines()[0]}") from error
    processor, token = load_processor(path, config, auto, image_token, **source)
    anatomy = find_anatomy(model, layers, image_token=token, protect=protect)
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise SvlError(f"the checkpoint '{path}' lacks {len(missing)} weights, {missing[0]} for one")
    try:
        model = nn.Module.to(model, find_device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise SvlError(f"cannot use model.device='{device}': {str(error).splitlines()[0]}") from error
    lvlm = Lvlm(model, processor, anatomy, name)
    log.info("loaded %s: %d decoder layers, %.1f M parameters", name, anatomy.n_layers, lvlm.parameters() / 1e6)
    return lvlm


def find_device(device: str) -> torch.device:
    """A torch device; "auto" is the first accelerator, else the CPU."""
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    return torch.device(device)


def place(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What a speed depends on besides the model: type and name of the device, and the batch size."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"type": device.type, "name": name, "batch_size": batch_size}


def load_processor(
    path: str | Path, config: Any, auto: Any, image_token: int | str | None = None, **source: Any
) -> tuple[Any, int | None]:
    """The processor of a model (a tokenizer for text-only ones) and the id of its image placeholder.

    `config` and `auto` are as `describe` gives them, `source` what transformers needs to find the files.

    Raises:
        SvlError: if the processor is missing, or the model takes images and no one knows where in their prompts.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    sees = auto is AutoModelForImageTextToText or image_token_id(config) is not None
    try:
        processor: Any = (AutoProcessor if sees else AutoTokenizer).from_pretrained(path, **source)
    except (OSError, ValueError, RuntimeError) as error:
        raise SvlError(f"cannot load a model from '{path}': {str(error).splitlines()[0]}") from error
    token = _placeholder(config, processor, image_token) if sees else None
    if sees and token is None:  # going on would treat it as a text model
        raise SvlError(
            f"{config.model_type} models take images, but where in their prompts is not known: name the placeholder "
            "with model.image_token="
        )
    return processor, token


def _placeholder(config: Any, processor: Any, image_token: int | str | None) -> int | None:
    """Id of the image placeholder: what the user names, else the config, else the processor.

    Raises:
        SvlError: if the user names one that the tokenizer does not know.
    """
    if image_token is None and (known := image_token_id(config)) is not None:
        return known
    token = getattr(processor, "image_token", None) if image_token is None else image_token
    if not isinstance(token, str):
        return token
    tokenizer = getattr(processor, "tokenizer", processor)
    if token not in (vocabulary := tokenizer.get_vocab()):
        guess = did_you_mean(token, tokenizer.all_special_tokens)
        raise SvlError(f"model.image_token '{token}' is no token of the model{guess}")
    return vocabulary[token]
