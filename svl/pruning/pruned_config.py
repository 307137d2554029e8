"""The config of a model with fewer layers: every field that counts, lists or numbers layers, or is divided by depth."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError, explained
from svl.core.plan import Plan
from svl.models.anatomy import DEPTH_FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern")
INDEX_SETS = ("cross_attention_layers", "moe_layers", "mlp_only_layers", "full_attn_idxs", "rope_scaling_layers")
PREFIX = ("max_window_layers", "first_k_dense_replace")  # count layers from the first
SUFFIX = ("num_kv_shared_layers",)  # count layers from the last
BY_LAYER = ("per_layer_config",)  # dicts by layer number
BY_ROOT_OF_DEPTH = ("scale_depth",)  # the model divides them by sqrt(number of layers): MiniCPM3


def pruned_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """A copy of a model config whose text part has the layers of `plan`.

    Raises:
        SvlError: if a field may have one value per layer and is not known to be such, no known field counts the layers,
            or transformers would read the new config otherwise than it is meant.
    """
    config = copy.deepcopy(config)
    if not plan.removed:
        return config
    text = config.get_text_config(decoder=True)
    before = text.to_dict()
    after = {**before, **pruned_fields(before, plan)}
    with explained(f"{text.model_type} cannot do without layers {list(plan.removed)}"):
        new = type(text).from_dict(copy.deepcopy(after))
        getattr(new, "kv_sharing_modes", None)  # computed, and checked, only when it is asked for
    new.dtype = text.dtype
    known = (*DEPTH_FIELDS, *PER_LAYER, *INDEX_SETS, *PREFIX, *SUFFIX)
    for name, value in new.to_dict().items():
        if name in known and as_json(value) != as_json(after.get(name)):
            raise SvlError(
                f"{text.model_type} cannot do without layers {list(plan.removed)}: with '{name}' {after.get(name)}, "
                f"it would be made with {value}"
            )
    if new.num_hidden_layers != len(plan.kept):
        raise SvlError(
            f"{text.model_type} cannot do without layers {list(plan.removed)}: its config counts layers in none of the "
            f"known fields ({', '.join(DEPTH_FIELDS)})"
        )
    if text is config:
        return new
    setattr(config, next(name for name in config.sub_configs if getattr(config, name, None) is text), new)
    return config


def pruned_fields(text: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The fields of a text config that change with `plan`.

    Raises:
        SvlError: if a field may have one value per layer, and is not known to be such.
    """
    kept = plan.kept
    fields: dict[str, Any] = {}
    for name, value in text.items():
        if name in INDEX_SETS and isinstance(value, list | tuple):
            fields[name] = [kept.index(i) for i in value if i in kept]
        elif name in PREFIX and isinstance(value, int):
            fields[name] = sum(i < value for i in kept)
        elif name in SUFFIX and isinstance(value, int):
            fields[name] = sum(i >= plan.n_layers - value for i in kept)
        elif name in BY_LAYER and value:
            fields[name] = {kept.index(int(i)): own for i, own in value.items() if int(i) in kept}
        elif name in BY_ROOT_OF_DEPTH and isinstance(value, int | float):
            fields[name] = value * math.sqrt(len(kept) / plan.n_layers)
        elif isinstance(value, list | tuple) and len(value) == plan.n_layers and "token_id" not in name:
            if name not in PER_LAYER:
                raise SvlError(
                    f"config field '{name}' of {text.get('model_type')} may be per-layer, and pruning it is unknown"
                )
            fields[name] = [value[i] for i in kept]
        elif name in DEPTH_FIELDS and value == plan.n_layers:
            fields[name] = len(kept)
    if (step := text.get("decoder_sparse_step") or 1) > 1:  # every step-th layer has experts: said layer by layer
        dense = text.get("mlp_only_layers") or ()
        fields["mlp_only_layers"] = [new for new, old in enumerate(kept) if (old + 1) % step or old in dense]
        fields["decoder_sparse_step"] = 1
    return fields


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))
