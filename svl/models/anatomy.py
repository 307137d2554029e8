"""Where the parts of a model are that pruning touches, found by structure, never by the model's name.

What structure cannot tell is an error that asks for `model.layers`, not a guess: a scan that falls back to "some list
of layers" finds the vision tower sooner or later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from svl.core.errors import SvlError, one_of
from svl.core.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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

# Config fields that count layers, of decoders and of towers; as transformers' configs have them.
DEPTH_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth", "num_blocks",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "image_patch_id")
VIDEO_TOKEN_FIELDS = ("video_token_id", "video_token_index")

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
        video_token_id: the same of videos; None for models without, and for those that have one placeholder for both.
        writers: role ("attn", "mlp") -> the writer of every layer; roles that some layer lacks are missing.
        protected: layer that must stay -> why.
        waived: layers that others depend on, but whose protection `model.protect` has lifted: they may be removed, and
            the pruned model then computes something else than the full one that skips them.
        entered: behind how many of the first layers visual features enter (DeepStack), so that they cannot run by
            themselves.
    """

    layers: str
    n_layers: int
    hidden_size: int
    image_token_id: int | None
    writers: dict[str, tuple[Writer, ...]]
    protected: dict[int, str] = field(default_factory=dict)
    waived: tuple[int, ...] = ()
    video_token_id: int | None = None
    entered: int = 0

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that visual features replace, of images and of videos."""
        return tuple(token for token in (self.image_token_id, self.video_token_id) if token is not None)

    @property
    def removable(self) -> tuple[int, ...]:
        """Layers that may be removed."""
        return tuple(i for i in range(self.n_layers) if i not in self.protected)

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of the model that this describes."""
        return model.get_submodule(self.layers)  # type: ignore[return-value]

    def layer_number(self, name: str) -> int | None:
        """The number of the decoder layer that a parameter or stored tensor of this name belongs to, if any."""
        path = self.layers.split(".")
        for start in range(len(path)):  # checkpoints of the bare decoder leave out the first parts
            if found := re.match(rf"{re.escape('.'.join(path[start:]))}\.(0|[1-9][0-9]*)\.", name):
                return int(found[1])
        return None

    def check_plan(self, plan: Plan, name: str, protect: bool = True) -> None:
        """Raise SvlError unless `plan` is for a model of this depth (called `name`) and spares protected layers."""
        if plan.n_layers != self.n_layers:
            raise SvlError(f"the plan is for {plan.n_layers} decoder layers, but '{name}' has {self.n_layers}")
        if missing := sorted({role for _, role in plan.sublayers} - set(self.writers)):
            raise SvlError(f"the plan removes sub-layers '{missing[0]}', which some layer of '{name}' lacks, or hides")
        if protect and (forbidden := sorted(set(plan.removed) & set(self.protected))):
            raise SvlError(
                f"the plan removes layers {forbidden}, which '{name}' needs: {self.protected[forbidden[0]]} "
                "(protect=none removes them all the same)"
            )


def find_anatomy(
    model: PreTrainedModel,
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
    n_layers, hidden = decoder_size(model)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers}
    path = layers or find_decoder(model, lists, hidden)
    if path not in lists:
        raise SvlError(f"model.layers='{layers}' is no list of {n_layers} layers; candidates: {', '.join(lists)}")
    tied = tied_layers(model.config)
    protected = protected_layers(protect, tied, n_layers)
    return Anatomy(
        layers=path,
        n_layers=n_layers,
        hidden_size=hidden,
        image_token_id=image_token_id(model.config) if image_token is None else image_token,
        writers=find_writers(lists[path], hidden),
        protected=protected,
        waived=tuple(i for i in tied if i not in protected),
        video_token_id=token_id(model.config, VIDEO_TOKEN_FIELDS),
        entered=entered_layers(model.config),
    )


def decoder_size(model: PreTrainedModel) -> tuple[int, int]:
    """How many layers the language decoder of a model has, and their width, as its config says.

    Raises:
        SvlError: if it does not say, or layers of such a model cannot be removed.
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
    return n_layers, hidden


def find_decoder(model: PreTrainedModel, lists: dict[str, nn.ModuleList], hidden: int) -> str:
    """The path of the one of `lists` whose layers write vectors of width `hidden` and belong to no encoder.

    Raises:
        SvlError: if it is none of them, or several are.
    """
    outside = [path for path in lists if not any(word in path.lower() for word in NOT_DECODER)]
    found = [path for path in outside if find_writers(lists[path], hidden)]
    if len(found) == 1:
        return found[0]
    what = "several lists of decoder layers" if found else "no decoder layers"
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    message = f"found {what} in {type(model).__name__} ({n_layers} layers of width {hidden} expected)"
    if candidates := ", ".join(found or outside):
        message += f"; if it is one of {candidates}, choose it with model.layers="
    raise SvlError(message)


def image_token_id(config: PreTrainedConfig) -> int | None:
    """The image placeholder that a model's config, or its vision part, names."""
    return token_id(config, IMAGE_TOKEN_FIELDS)


def token_id(config: PreTrainedConfig, fields: Sequence[str]) -> int | None:
    """The token that a model's config, or its vision part, names in the first of `fields` that it has."""
    parts = (config, getattr(config, "vision_config", None))
    values = (getattr(part, name, None) for part in parts for name in fields)
    return next((value for value in values if isinstance(value, int)), None)


def entered_layers(config: PreTrainedConfig) -> int:
    """Behind how many layers visual features enter: the i-th of them behind decoder layer i, by its position alone."""
    visual = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return len(visual)


def tied_layers(config: PreTrainedConfig) -> dict[int, str]:
    """Layers that others depend on in ways that a pruned config cannot express, each with the reason."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or []
    found = {}
    for i in range(entered_layers(config)):
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


def protected_layers(protect: str | Sequence[int], tied: dict[int, str], n_layers: int) -> dict[int, str]:
    """The layers that must stay, by the setting `model.protect`."""
    if not isinstance(protect, list | tuple):
        one_of("model.protect", protect, ("auto", "none"))
        return tied if protect == "auto" else {}
    if wrong := [i for i in protect if i not in range(n_layers)]:
        raise SvlError(f"model.protect names layers {wrong}, but the model has layers 0..{n_layers - 1}")
    return {i: tied.get(i, "model.protect names it") for i in sorted(protect)}


def find_writers(layers: nn.ModuleList, hidden: int) -> dict[str, tuple[Writer, ...]]:
    """Role -> the writer of every layer, for roles that all `layers` have."""
    found = {role: [find_writer(layer, names, hidden) for layer in layers] for role, names in WRITERS.items()}
    return {role: tuple(w for w in writers if w) for role, writers in found.items() if all(writers)}


def find_writer(layer: nn.Module, patterns: tuple[re.Pattern[str], ...], hidden: int) -> Writer | None:
    """What of `layer` fits `patterns` and writes vectors of width `hidden`; None if nothing does, or in doubt."""
    named = [{n: p for n, p in layer.named_parameters() if names.fullmatch(n)} for names in patterns]
    parameters = next((found for found in named if found), {})
    biases = tuple(n for n, p in parameters.items() if p.ndim == 1)
    matrices: dict[str, bool] = {}
    for name, p in parameters.items():
        if p.ndim > 1:
            flipped = is_transposed(layer, name, p, hidden)
            if flipped is None:
                return None
            matrices[name] = flipped
    if not matrices or any(len(parameters[n]) != hidden for n in biases):
        return None
    first = next(iter(matrices))
    alone = len(matrices) == 1 and first.endswith(".weight")
    return Writer(first.removesuffix(".weight") if alone else first.partition(".")[0], matrices, biases)


def is_transposed(layer: nn.Module, name: str, p: Tensor, hidden: int) -> bool | None:
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
