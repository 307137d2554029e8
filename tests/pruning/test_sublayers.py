"""Attention or MLP removed of layers that stay: what is computed, saved, kept and exported."""

from __future__ import annotations

import copy
import functools
import json
import re

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint
from helpers.families import SUPPORTED, generate, lvlm_of
from helpers.references import close, logits, together
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import svl
from svl.checkpoints import export
from svl.core import Plan, SvlError, Update
from svl.core.patch import Patch
from svl.evaluation import efficiency
from svl.evaluation.settings import EfficiencySettings
from svl.pruning import sublayers
from svl.pruning.selfcheck import check_surgery
from svl.pruning.sublayers import NoAttention, NoMlp
from svl.pruning.surgery import apply


def silenced(lvlm, plan: Plan):
    """A copy of the dense model that skips the plan's layers, and whose removed sub-layers have weights of 0."""
    zeros = {key: Update(scale=0.0) for key in plan.sublayers}
    return apply(lvlm, Plan(plan.n_layers, plan.removed), Patch(zeros)).model


def absent(lvlm) -> list[str]:
    return [type(m).__name__ for m in lvlm.layers.modules() if isinstance(m, NoAttention | NoMlp)]


@pytest.mark.parametrize(
    ("plan", "left_out"),
    [
        (Plan(4, (), removed_attn=(1, 2)), ["NoAttention", "NoAttention"]),
        (Plan(4, (), removed_attn=(3,), removed_mlp=(0, 1)), ["NoMlp", "NoMlp", "NoAttention"]),
        (Plan(4, (1,), removed_attn=(2,), removed_mlp=(3,)), ["NoAttention", "NoMlp"]),
        (Plan(4, (0,), removed_attn=(1,)), []),  # the first layer left, whose cache tells how much is read
        (Plan(4, (), removed_attn=(1, 3), removed_mlp=(1, 2)), ["NoMlp", "NoAttention"]),
    ],
    ids=str,
)
def test_what_is_left_out_writes_nothing(plan, left_out, lm, samples, encode):
    inputs = encode(lm, samples.samples[:3])
    pruned, reference = apply(lm, plan), silenced(lm, plan)
    assert absent(pruned) == left_out
    assert check_surgery(lm, pruned, plan, inputs) < 1e-6
    close(logits(pruned.model, inputs), logits(reference, inputs), 1e-6)
    words, numbers = generate(pruned.model, inputs)
    expected, same = generate(reference, inputs)
    assert torch.equal(words, expected)
    close(numbers, same, 1e-5)
    assert (logits(pruned.model, inputs) - logits(apply(lm, Plan(4, plan.removed)).model, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_does_without(family):
    """Attention of the last layer, MLP of the one before; where blocks are of another kind, they write zeros."""
    lvlm, made = lvlm_of(family)
    n = lvlm.anatomy.n_layers
    roles = lvlm.anatomy.writers
    plan = Plan(n, (), removed_attn=(n - 1,) if "attn" in roles else (), removed_mlp=(n - 2,) if "mlp" in roles else ())
    pruned = apply(lvlm, plan)
    assert check_surgery(lvlm, pruned, plan, made.inputs) < 1e-5
    assert torch.equal(generate(pruned.model, made.inputs)[0], generate(silenced(lvlm, plan), made.inputs)[0])


def test_models_without_blocks_are_copied_and_pruned_on(vlm, samples, encode):
    inputs = encode(vlm, samples.samples[:2])
    pruned = apply(vlm, Plan(4, (), removed_attn=(2,), removed_mlp=(1,)))
    again = apply(pruned, Plan(4, ()))
    assert torch.equal(logits(again.model, inputs), logits(pruned.model, inputs))
    less = apply(pruned, Plan(4, (0,)))
    assert torch.equal(
        logits(less.model, inputs), logits(apply(vlm, Plan(4, (0,), removed_attn=(2,), removed_mlp=(1,))).model, inputs)
    )


def test_models_without_blocks_answer_together_as_alone(vlm, samples, encode):
    inputs = encode(vlm, samples.samples[:3])
    models = [apply(vlm, Plan(4, (), removed_attn=attn, removed_mlp=mlp))
              for attn, mlp in (((3,), ()), ((2,), ()), ((2,), (3,)), ((), (1, 3)))] + [vlm]  # fmt: skip
    alone = [generate(m.model, inputs) for m in models]
    found, shared = together(models, lambda model: generate(model, inputs))
    for (words, numbers), (expected_words, expected_numbers) in zip(found, alone, strict=True):
        assert torch.equal(words, expected_words)
        assert torch.equal(numbers, expected_numbers)
    assert shared.layers_saved > 0


def test_what_is_saved_is_counted(llama, samples):
    settings = EfficiencySettings(new_tokens=3, warmup=0, repeats=1, batch_size=2)
    measure = functools.partial(efficiency.measure_efficiency, llama, sample=samples.samples[0], settings=settings)
    attention = sum(p.numel() for p in llama.layers[2].self_attn.parameters())
    mlp = sum(p.numel() for p in llama.layers[1].mlp.parameters())
    matrices = sum(p.numel() for p in llama.layers[2].self_attn.parameters() if p.ndim == 2)
    found = measure(apply(llama, Plan(4, (), removed_attn=(2,))))
    tokens, (dense, pruned) = found["sequence"], (found["dense"], found["pruned"])
    assert dense["parameters"] - pruned["parameters"] == attention
    scores = 2 * 2 * 2 * tokens * tokens * 32  # and their sum, of two prompts
    assert dense["prefill_flops"] - pruned["prefill_flops"] == 2 * 2 * tokens * matrices + scores
    assert pruned["cache_bytes"] == dense["cache_bytes"] * 3 // 4
    both = measure(apply(llama, Plan(4, (), removed_attn=(2,), removed_mlp=(1,))))
    whole = sum(p.numel() for p in llama.layers.parameters())
    assert both["ideal"] == whole / (whole - attention - mlp)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "aria"])
def test_experts_count_as_far_as_a_token_is_given_to_them(family):
    """Against operations of one token: two for each weight that acts on it, and the attention to itself."""
    lvlm, made = lvlm_of(family)
    text, n = lvlm.model.config.get_text_config(), lvlm.anatomy.n_layers
    by_one = copy.deepcopy(lvlm.model)
    by_one.set_experts_implementation("eager")  # whose products torch counts

    def operations(model, inputs) -> int:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=False)
        return counter.get_total_flops()

    attention = 4 * text.num_attention_heads * text.head_dim * n
    one = operations(by_one, {"input_ids": torch.tensor([[7]])}) - attention - 2 * lvlm.model.lm_head.weight.numel()
    vectors = sum(p.numel() for p in lvlm.layers.parameters() if p.ndim == 1)
    active = efficiency.active_parameters(lvlm)
    assert active == one / 2 + vectors < 0.9 * sum(p.numel() for p in lvlm.layers.parameters())
    without = apply(lvlm, Plan(n, (), removed_attn=tuple(range(1, n))))
    assert efficiency.ideal_speed(lvlm, without) == active / efficiency.active_parameters(without)
    assert efficiency.pass_counts(lvlm, made.inputs)["prefill_flops"] == operations(by_one, made.inputs)


def test_blocks_that_stay_in_memory_are_named(llama):
    plan = Plan(4, (), removed_attn=(0, 2), removed_mlp=(1,))
    assert sublayers.names_of_zeros(llama, plan) == ["0.attn"]  # whose cache tells how much has been read
    lvlm, _ = lvlm_of("qwen3_vl_moe")
    assert "1.mlp" in sublayers.names_of_zeros(lvlm, Plan(lvlm.anatomy.n_layers, (), removed_mlp=(1,)))


# ------------------------------------------------------------------------------------------------- plans


def test_layers_that_lose_both_are_removed():
    plan = Plan(5, (0,), removed_attn=(3, 1), removed_mlp=(3, 2))
    assert plan == Plan(5, (0, 3), removed_attn=(1,), removed_mlp=(2,))
    assert plan.sublayers == ((1, "attn"), (2, "mlp"))
    assert not plan.is_empty
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(SvlError, match="plan removes all 2 decoder layers"):
        Plan(2, (0,), removed_attn=(1,), removed_mlp=(1,))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"removed_attn": (1,)}, r"removed_attn of a plan has layers \[1\], which are removed as a whole"),
        ({"removed_mlp": (2, 2)}, r"removed_mlp of a plan is \[2, 2\], but must be different ones"),
        ({"removed_mlp": (4,)}, r"removed_mlp of a plan is \[4\]"),
        ({"removed_attn": (0.5,)}, "a layer of removed_attn is 0.5, but must be a whole number"),
    ],
)
def test_sublayers_of_a_plan_are_what_they_must_be(parts, says):
    with pytest.raises(SvlError, match=says):
        Plan(4, (1,), **parts)
    with pytest.raises(SvlError, match=f"not a plan: .*{says}"):
        Plan.from_json(json.dumps({"n_layers": 4, "removed": [1], **parts}))


# ------------------------------------------------------------------------------------------------ exports


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_exports_have_zeros_and_say_so(kind, checkpoint, tmp_path, samples, encode, caplog):
    lvlm, plan = svl.load(checkpoint(kind), device="cpu"), Plan(4, (0,), removed_attn=(2,), removed_mlp=(1,))
    ours = export.save(checkpoint(kind), plan, tmp_path / "out")
    assert "2.attn write zeros in the checkpoint" in caplog.text.replace("1.mlp, ", "")
    silenced(lvlm, plan).save_pretrained(tmp_path / "memory")
    assert_same_checkpoint(ours, tmp_path / "memory")
    inputs, again = encode(lvlm, samples.samples[:2]), svl.load(ours, device="cpu")
    close(logits(again.model, inputs), logits(apply(lvlm, plan).model, inputs), 1e-6)
    card = (ours / "README.md").read_text()
    assert re.search(r"of others 1\.mlp, 2\.attn \(layer\.projection\), whose weights are zeros here", card)
    record = json.loads((ours / "config.json").read_text())["layer_pruning"]
    assert (record["removed_attn"], record["removed_mlp"], record["compensated"]) == ([2], [1], [])
