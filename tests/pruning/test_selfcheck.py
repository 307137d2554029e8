"""What a layer computes may hang on its position, or on the model's depth: found, made good, or refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.families import FAMILIES, randomise
from torch import nn
from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig, MiniCPM3Config

from svl.core import Plan, SvlError
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.models.transformers_internals import empty_model
from svl.pruning.pruned_config import pruned_config
from svl.pruning.selfcheck import check_layer_settings, check_surgery
from svl.pruning.surgery import apply

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
IDS = {"input_ids": torch.arange(3, 23)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}


def lvlm_from(config, dtype=torch.float32) -> Lvlm:
    model = randomise(AutoModelForCausalLM.from_config(config)).to(dtype)
    return Lvlm(model, None, find_anatomy(model), config.model_type)


def skeletons(config, plan):
    """The decoder layers of the dense and the pruned model, on the meta device, as an export has them."""
    for one in (config, pruned_config(config, plan)):
        yield empty_model(AutoModelForCausalLM, one, torch.float32, shapes_only=True).model.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("removed", [(1,), (0, 2, 3), (5,)], ids=str)
def test_minicpm3_keeps_the_scale_of_its_branches(removed, dtype):
    """It multiplies every branch by scale_depth / sqrt(layers): without help, all would grow."""
    dense, plan = lvlm_from(MiniCPM3Config(**SIZES, **MLA, scale_depth=1.4), dtype), Plan(6, removed)
    pruned = apply(dense, plan)
    assert pruned.model.config.scale_depth / math.sqrt(len(plan.kept)) == pytest.approx(1.4 / math.sqrt(6), rel=1e-12)
    assert dense.model.config.scale_depth == 1.4
    assert check_surgery(dense, pruned, plan, IDS) <= torch.finfo(dtype).eps
    check_layer_settings(*skeletons(dense.model.config, plan), plan, "minicpm3")
    unscaled = pruned_config(dense.model.config, plan)
    unscaled.scale_depth = 1.4
    naive = empty_model(AutoModelForCausalLM, unscaled, torch.float32, shapes_only=True)
    with pytest.raises(SvlError, match=r"'residual_scale' of layer .* is made from its position or the model's depth"):
        check_layer_settings(dense.layers, naive.model.layers, plan, "minicpm3")


def test_minicpm3_can_be_pruned_twice():
    dense = lvlm_from(MiniCPM3Config(**SIZES, **MLA, scale_depth=1.4))
    twice, at_once = apply(apply(dense, Plan(6, (1,))), Plan(5, (1, 3))), apply(dense, Plan(6, (1, 2, 4)))
    torch.testing.assert_close(twice.model(**IDS).logits, at_once.model(**IDS).logits, atol=1e-5, rtol=1e-5)


def test_diffllama_cannot_lose_layers_before_others():
    """Its lambda is 0.8 - 0.6 exp(-0.3 i) in layer i, which no config can say; behind the last kept one all may go."""
    dense = lvlm_from(DiffLlamaConfig(**SIZES))
    message = (
        r"'diffllama' cannot do without layers \[2\]: 'lambda_init' of layer 3 is made from its position or the "
        r"model's depth, and would be 0\.470\d* instead of 0\.556\d*$"
    )
    with pytest.raises(SvlError, match=message):
        apply(dense, Plan(6, (2,)))
    with pytest.raises(SvlError, match="'lambda_init' of layer 1"):
        check_layer_settings(*skeletons(dense.model.config, Plan(6, (0,))), Plan(6, (0,)), "diffllama")
    plan = Plan(6, (4, 5))
    assert check_surgery(dense, apply(dense, plan), plan, IDS) <= 1e-6


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe", "gemma4", "llama4", "lfm2_vl"])
def test_layers_of_known_families_stay_what_they_are(family):
    """Layer numbers change, kinds of layers and of attention do not."""
    made = FAMILIES[family]()
    anatomy = find_anatomy(made.model, image_token=made.image_token_id)
    lvlm = Lvlm(made.model, None, anatomy, family)
    for layer in anatomy.removable:
        apply(lvlm, Plan(anatomy.n_layers, (layer,)))


class Layer(nn.Module):
    """A layer with settings of its own."""

    def __init__(self, **settings):
        super().__init__()
        for name, value in settings.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)


def layers_of(*settings):
    return nn.ModuleList(Layer(**s) for s in settings)


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        ({"layer_idx": 2}, {"layer_idx": 1}, True),  # kept layer 2 is now layer 1
        ({"layer_idx": 2}, {"layer_idx": 0}, False),
        ({"window": 4}, {"window": 4}, True),
        ({"window": 4}, {"window": 8}, False),
        ({"scale": 0.1 + 0.2}, {"scale": 0.3}, True),  # rounding
        ({"scale": 0.3}, {"scale": 0.300001}, False),
        ({"kind": "full"}, {"kind": "sliding"}, False),
        ({"kind": None}, {"kind": "sliding"}, False),
        ({"gate": True}, {"gate": False}, False),
        ({"sizes": (1, 2)}, {"sizes": (1, 2)}, True),
        ({"sizes": [1, 2]}, {"sizes": [1, 3]}, False),
        ({"slopes": torch.tensor([1.0, 2.0])}, {"slopes": torch.tensor([1.0, 2.0])}, True),
        ({"slopes": torch.tensor([1.0, 2.0])}, {"slopes": torch.tensor([1.0, 3.0])}, False),
        ({"slopes": torch.tensor([1.0, 2.0])}, {"slopes": torch.tensor([1.0, 3.0], device="meta")}, True),  # not known
        ({"mlp": nn.Linear(2, 2)}, {"mlp": nn.Conv1d(2, 2, 1)}, False),
        ({"mlp": nn.Linear(2, 2)}, {}, False),
    ],
    ids=str,
)
def test_settings_of_a_layer_are_compared(before, after, fits):
    dense, pruned = layers_of({"layer_idx": 0}, {"layer_idx": 1}, before), layers_of({"layer_idx": 0}, after)
    if fits:
        check_layer_settings(dense, pruned, Plan(3, (1,)), "mine")
    else:
        with pytest.raises(
            SvlError, match=r"'mine' cannot do without layers \[1\]: ('\w+' of layer 2 is|layer 2 would)"
        ):
            check_layer_settings(dense, pruned, Plan(3, (1,)), "mine")


def test_an_error_of_a_few_percent_does_not_pass_in_half_precision():
    """Five percent of the largest logit was allowed; a systematic error of three is found, rounding is not one."""
    dense, plan = lvlm_from(LlamaConfig(**SIZES), torch.bfloat16), Plan(6, (2,))
    pruned = apply(dense, plan)
    assert check_surgery(dense, pruned, plan, IDS) == 0
    pruned.model.lm_head.weight = nn.Parameter(pruned.model.lm_head.weight * 1.03)
    with pytest.raises(SvlError, match=r"failed its check: without layers \[2\], logits are 0\.0\d+ "):
        check_surgery(dense, pruned, plan, IDS)
