"""The one module that uses what transformers does not document: private attributes, and the machinery of loading.

Each name is imported or read here and nowhere else, so that a release of transformers that moves one breaks one test.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from logging import Filter, LogRecord
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from svl.text.escaping import for_terminal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


DYNAMIC = "transformers_modules."  # the package of code that comes with checkpoints


class EscapedMessages(Filter):
    """Names and values from a checkpoint's files, which transformers repeats in its warnings, as plain text."""

    def filter(self, record: LogRecord) -> bool:
        """Let every record through, rewritten."""
        record.msg, record.args = for_terminal(record.getMessage()), ()
        return True


for _handler in logging.get_logger().handlers:
    _handler.addFilter(EscapedMessages())


@dataclass(frozen=True)
class Destination:
    """Where a tensor on disk belongs: a parameter (or buffer) of the model, and what it undergoes on the way there."""

    name: str
    converter: WeightConverter | None = None  # None: it is taken as it is


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """The class that makes a model of this config: AutoModelForImageTextToText or AutoModelForCausalLM.

    With `trust_remote_code`, code that comes with the checkpoint counts, by what its config says that it offers. None
    if it is neither, or a text model with an encoder.
    """
    if trust_remote_code and type(config).__module__.startswith(DYNAMIC):
        offered = getattr(config, "auto_map", None) or {}
        return next((a for a in (AutoModelForImageTextToText, AutoModelForCausalLM) if a.__name__ in offered), None)
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    if type(config) in AutoModelForCausalLM._model_mapping and not config.is_encoder_decoder:
        return AutoModelForCausalLM
    return None


def attention_implementation(config: PreTrainedConfig) -> str:
    """The attention that a config (of a model, or of a part) selects, such as "sdpa"."""
    return config._attn_implementation


def swap_decoder_attention(model: PreTrainedModel, implementation: str) -> str:
    """Let the decoder, and no other part of the model, use an attention implementation; the one that it used before."""
    config = model.config
    text = config.get_text_config(decoder=True)
    before = attention_implementation(text)
    # "" is the root alone: where text and other parts share one config, the others keep their attention
    part = next((name for name in config.sub_configs if getattr(config, name, None) is text), "")
    model.set_attn_implementation({part: implementation})
    return before


def model_on_meta(like: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the class, dtype and attention of `like` for another config, wholly on the meta device."""
    parts = {name: part for name in like.config.sub_configs if (part := getattr(like.config, name, None)) is not None}
    attention: Any = attention_implementation(like.config)
    if parts:
        attention = {"": attention} | {name: attention_implementation(part) for name, part in parts.items()}
    with torch.device("meta"):
        return type(like)._from_config(config, attn_implementation=attention, dtype=like.dtype)


def tie_as_loaded(model: PreTrainedModel, present: Collection[str]) -> None:
    """Tie the parameters that the config says are one, but for those that were stored apart with other values.

    `present` are the names of the parameters that came from disk.
    """
    missing = set(model.state_dict()) - set(present)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


@contextmanager
def without_report() -> Iterator[None]:
    """Within the block, transformers does not print its table of weights that do not fit: svl says what matters."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def keep_stored_layout(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Let `target` be saved in the layout on disk that `source` was loaded from."""
    if (conversions := getattr(source, "_weight_conversions", None)) is not None:
        target._weight_conversions = conversions


def empty_model(
    auto: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    shapes_only: bool = False,
    most: int | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model that a config describes, in evaluation mode, its parameters on the meta device.

    Its buffers (such as rotary tables) are computed; with `shapes_only` they are on the meta device, too, which takes
    a fraction of the time. `attention` is its implementation of attention, transformers' choice if None.

    Raises:
        ValueError: if it has more than `most` parameters (tensors, not their elements), which is told before all of
            them are made.
    """
    settings: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    settings |= {"attn_implementation": attention} if attention else {}
    with ExitStack() as stack:
        if most is not None:
            stack.enter_context(_at_most(most))
        if shapes_only:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(meta_device_safe_creation_ops())
            stack.enter_context(no_init_weights())
        else:
            stack.enter_context(_parameters_on_meta())
        model = auto.from_config(config, dtype=dtype, **settings)
    if shapes_only:
        model.tie_weights()  # left out without initialisation
    return model.requires_grad_(False).eval()


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Within the block, modules get no more parameters than that: a ValueError says so."""
    register, made = nn.Module.register_parameter, 0

    def count(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal made
        made += param is not None
        if made > most:
            raise ValueError(f"its config describes more than {most:,} weights, far more than it has")
        register(module, name, param)

    nn.Module.register_parameter = count  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, modules get parameters without values (buffers are computed as ever)."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill_model(
    model: PreTrainedModel, stored: dict[str, Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> list[Any]:
    """Put tensors on disk (by their names there, as slices of safetensors files) into the model.

    In the model's own dtypes, or all in another one. Returns what did not fit.
    """
    settings = LoadStateDictConfig(
        device_map={"": torch.device(device)},
        dtype=dtype or model.dtype,
        dtype_plan={} if dtype else model._get_dtype_plan(model.dtype),
        weight_mapping=_stored_layouts(model),
    )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(model, stored, settings)
    finally:
        if shown:
            logging.enable_progress_bar()
    return [*info.mismatched_keys, *info.conversion_errors]


def _stored_layouts(model: PreTrainedModel) -> list[Any]:
    """Renamings and conversions between names and tensors on disk and the model's own."""
    return list(get_model_conversion_mapping(model))


def match_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Destination]:
    """Where the model puts tensors of these names, found as transformers finds it on loading.

    Tensors that the model has no use for are missing.
    """
    transforms = _stored_layouts(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    state, base = model.state_dict(), model.base_model_prefix
    places = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on the ones before
        name, pattern = rename_source_key(key, renamings, converters, base, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base, state)
        if name in state:
            places[key] = Destination(name, converter_of.get(pattern) if pattern else None)
    return places


def missing_parameters(model: PreTrainedModel, places: dict[str, Destination]) -> list[str]:
    """Parameters and persistent buffers of the model that no tensor on disk makes, sorted."""
    made = set()
    for place in places.values():
        targets = place.converter.target_patterns if place.converter else [""]
        made |= {place.name.replace(targets[0], target) for target in targets}
    optional = "|".join(model._keys_to_ignore_on_load_missing or ()) or r"(?!)"
    tied = model.all_tied_weights_keys
    made |= {source for target, source in tied.items() if target in made}  # either of the two will do
    return sorted(n for n in model.state_dict().keys() - made if n not in tied and not re.search(optional, n))


def ignored_on_load(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers passes over a stored tensor that the model has no place for, without a warning."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return any(re.search(pattern, name) for pattern in patterns)
