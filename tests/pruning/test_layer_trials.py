"""Layers tried out: whoever is accepted computes what folding and joining mean; who is refused is listed by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.families import IMAGE, LLAMA, OPT, POST_NORM, SUPPORTED, Family, build, config, every, lvlm_of, randomise
from helpers.references import logits
from transformers import AutoModelForCausalLM, ChameleonConfig, ChameleonForConditionalGeneration

from svl.calibration.offload import load_offloaded
from svl.core import JoinedPart, Patch, Plan, SvlError, Update
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.pruning import folding, layer_trials
from svl.pruning.surgery import apply

NO_HEAD_DIM = {name: value for name, value in LLAMA.items() if name != "head_dim"}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
OTHERS = {  # beside the families: residual streams of other kinds
    "opt_post_norm": ("opt", {**OPT, "do_layer_norm_before": False}),
    "opt": ("opt", OPT),
    "falcon_h1": ("falcon_h1", {**LLAMA, **MAMBA, "mamba_chunk_size": 16}),
    "granite": ("granite", {**LLAMA, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    "olmo2": ("olmo2", LLAMA),
    "parallel": ("stablelm", {**NO_HEAD_DIM, "use_parallel_residual": True}),
    "qk_norm_by_head": ("stablelm", {**NO_HEAD_DIM, "qk_layernorm": True}),
    "bitnet": ("bitnet", LLAMA),
    "starcoder2": ("starcoder2", NO_HEAD_DIM),
}
IMAGE_CODES = {"<image>": IMAGE, **{f"IMGIMG{letter}{letter}Z": 5 + n for n, letter in enumerate("ABCD")}}


def chameleon(swin_norm: bool) -> Family:
    """A setting of this model normalises behind its projections, in modules of the usual names."""
    tower = {
        "embed_dim": 8, "num_embeddings": 4, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "in_channels": 3, "resolution": 16, "double_latent": False,
    }  # fmt: skip
    fields = {**NO_HEAD_DIM, "swin_norm": swin_norm, "vocabulary_map": IMAGE_CODES, "vq_config": tower}
    model = randomise(ChameleonForConditionalGeneration(ChameleonConfig(**fields)))
    ids = torch.tensor([[1, 7, 9, 20, 33, 12, 8, 41]])
    return Family(model, {"input_ids": ids}, None)


def other(name: str) -> tuple[Lvlm, Family]:
    if name.startswith("chameleon"):
        made = chameleon(name.endswith("swin"))
    else:
        kind, fields = OTHERS[name]
        made = build(config(kind, **fields), auto=AutoModelForCausalLM)
    return Lvlm(made.model, None, find_anatomy(made.model), name), made


def any_of(name: str) -> tuple[Lvlm, Family]:
    return lvlm_of(name) if name in SUPPORTED else other(name)


@pytest.fixture
def unnamed(monkeypatch):
    """Names of norms tell nothing."""
    monkeypatch.setattr(folding, "check_foldable", lambda lvlm: None)


def is_accepted(check, lvlm: Lvlm, inputs) -> bool:
    try:
        check(lvlm, inputs)
    except SvlError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- folding


def scaling_is_off(lvlm: Lvlm, inputs) -> float:
    """How far dividing all that is written behind a gap is from a stream that is multiplied there."""
    n, gone, factor = lvlm.anatomy.n_layers, 2, 1.7
    roles = tuple(lvlm.anatomy.writers)
    plan = Plan(n, (gone,))
    folded = apply(lvlm, plan, Patch({(i, r): Update(scale=1 / factor) for i in plan.kept if i > gone for r in roles}))
    reference = apply(lvlm, plan)

    def multiply(_, args, kwargs):
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * factor}

    before = reference.layers[gone].register_forward_pre_hook(multiply, with_kwargs=True)
    expected = logits(reference.model, inputs)
    before.remove()
    counts = expected > -1e30  # masked logits of images
    return float((logits(folded.model, inputs) - expected)[counts].abs().max() / expected[counts].abs().max())


@pytest.mark.usefixtures("unnamed")
@pytest.mark.parametrize("name", [*OTHERS, "chameleon", "chameleon_swin", "gemma2", "llama", "qwen3"])
def test_whoever_is_accepted_can_be_scaled_and_nobody_else(name):
    lvlm, made = any_of(name)
    accepted = is_accepted(layer_trials.check_folding, lvlm, made.inputs)
    off = scaling_is_off(lvlm, made.inputs)
    assert accepted == (off < 1e-3), off
    assert off < 1e-3 or off > 0.02


@pytest.mark.usefixtures("unnamed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_families_are_told_apart_without_names(family, dtype):
    lvlm, made = lvlm_of(family)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.inputs.items()}
    if dtype != torch.float32:
        lvlm = replace(lvlm, model=copy.deepcopy(lvlm.model).to(dtype))
    assert is_accepted(layer_trials.check_folding, lvlm, inputs) == (family not in POST_NORM)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("opt_post_norm", r"passes on another state than it is given when self_attn\.out_proj.* write nothing"),
        ("falcon_h1", r"passes on another state than it is given when self_attn\.o_proj.* write nothing"),
        ("chameleon_swin", r"does not add what self_attn\.o_proj\.weight writes"),
    ],
)
def test_refusals_name_the_layer_and_the_way_out(name, says):
    lvlm, made = other(name)
    with pytest.raises(SvlError, match=rf"layer 0 of '{name}' {says}.*compensation=none"):
        layer_trials.check_folding(lvlm, made.inputs)


def test_one_layer_of_every_kind_is_tried(monkeypatch):
    tried: list[int] = []
    run = layer_trials.LayerTrial.run
    monkeypatch.setattr(
        layer_trials.LayerTrial, "run", lambda self, changed=None: (tried.append(self.number), run(self, changed))[1]
    )
    passed: list[int] = []
    lvlm, made = lvlm_of("llama4")
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: passed.append(i)) for i, layer in enumerate(lvlm.layers)]
    layer_trials.check_folding(lvlm, made.inputs)
    assert [handle.remove() for handle in handles]
    assert set(tried) == {0, 1}
    assert passed == [0, 1]  # the rest of the pass is not run


def test_hooks_are_gone_and_weights_as_they_were():
    lvlm, made = lvlm_of("llama")
    before, weights = logits(lvlm.model, made.inputs), {n: p.clone() for n, p in lvlm.model.named_parameters()}
    layer_trials.check_folding(lvlm, made.inputs)
    layer_trials.check_joining(lvlm, made.inputs)
    assert torch.equal(logits(lvlm.model, made.inputs), before)
    assert all(torch.equal(p, weights[n]) for n, p in lvlm.model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lvlm.model.modules())


# ---------------------------------------------------------------------------------------------------- joining

JOINED = {  # families whose layers can be joined
    "aya_vision", "blip2", "cohere2_vision", "deepseek_vl", "fast_vlm", "gemma2", "gemma3", "gemma3_text", "idefics2",
    "idefics3", "instructblip", "internvl", "janus", "kosmos2_5", "llama", "llava", "llava_next", "llava_onevision",
    "mistral", "mistral3", "mllama", "molmo2", "ovis2", "paligemma", "paligemma2", "perception_lm", "pixtral", "qwen2",
    "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava",
}  # fmt: skip


def rearranged(lvlm: Lvlm, layer: int) -> Patch:
    """A layer joined of its own channels and heads, backwards, and of nothing of its neighbour."""
    queries, groups = lvlm.heads
    writer = lvlm.anatomy.writers["mlp"][layer].module
    channels = torch.arange(lvlm.layers[layer].get_parameter(f"{writer}.weight").shape[1]).flip(0)
    kept = torch.arange(groups).flip(0)
    heads = torch.arange(queries).reshape(groups, -1).flip(0).flatten()
    none = torch.arange(0)
    own, neighbour = JoinedPart(layer, 1, 1, channels, heads, kept), JoinedPart(layer + 1, 0, 0, none, none, none)
    return Patch(joins={layer: (own, neighbour)})


@pytest.mark.parametrize("name", [*SUPPORTED, *OTHERS])
def test_whoever_can_be_joined_computes_the_same_in_another_order(name):
    lvlm, made = any_of(name)
    accepted = is_accepted(layer_trials.check_joining, lvlm, made.inputs)
    if name in SUPPORTED:
        assert accepted == (name in JOINED)
    if not accepted:
        return
    pairs = sorted(i for i in layer_trials.joinable_layers(lvlm) if i + 1 in lvlm.anatomy.removable)
    plan = Plan(lvlm.anatomy.n_layers, (pairs[-1] + 1,))
    if {pairs[-1] + 1, pairs[-1]} - layer_trials.joinable_layers(lvlm):
        plan = Plan(lvlm.anatomy.n_layers, (pairs[0] + 1,))
    layer = plan.removed[0] - 1
    expected = logits(apply(lvlm, plan).model, made.inputs)
    joined = logits(apply(lvlm, plan, rearranged(lvlm, layer)).model, made.inputs)
    assert (joined - expected).abs().max() < 1e-4 * expected.abs().max()


def test_norms_that_are_in_the_way_are_found_by_their_effect():
    """Norms of single heads, by name of no kind that is known, and others that a mean of vectors would mix."""
    lvlm, made = other("qk_norm_by_head")
    with pytest.raises(SvlError, match=r"'self_attn\.q_layernorm\.norms\.0\.weight' is a tensor of which"):
        layer_trials.check_joining(lvlm, made.inputs)
    lvlm, made = lvlm_of("qwen3")
    model = copy.deepcopy(lvlm.model)
    for layer in model.model.layers:  # a norm over all channels of a head that differs from head to head
        width = torch.linspace(0.5, 2, layer.self_attn.o_proj.in_features)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, w=width: (args[0] * w,))
    with pytest.raises(SvlError, match="with its own channels and heads in another order, computes something else"):
        layer_trials.check_joining(replace(lvlm, model=model), made.inputs)


# --------------------------------------------------------------------------------- layers that are not in memory


def test_layers_on_disk_are_tried_as_they_are_read(checkpoint):
    lvlm = load_offloaded(checkpoint("llama"), device="cpu")
    layer_trials.check_folding(lvlm)
    layer_trials.check_joining(lvlm)
    assert all(p.is_meta for p in lvlm.layers.parameters())
    lvlm.skeleton.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: 2 * _[2].sign())
    with pytest.raises(SvlError, match=r"layer 0 of .* does not add what mlp\.down_proj\.weight writes"):
        layer_trials.check_folding(lvlm)
