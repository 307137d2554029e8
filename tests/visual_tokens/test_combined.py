"""What a pruned model is combined with: quantised weights, fewer visual tokens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.families import generate, lvlm_of
from helpers.references import logits
from hydra import compose, initialize_config_dir

from svl import config
from svl.core import Plan, SvlError
from svl.pruning import surgery
from svl.run import pipeline
from svl.visual_tokens.fastv import Fastv

SEEING = (
    "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "paligemma", "qwen2_5_vl", "ovis2",
    "glm4v", "mplug_owl2",
)  # fmt: skip
SLIDING = ("mistral3", "aya_vision", "qwen2_vl")  # windows shorter than the prompt


def masked(lvlm, inputs, layer, keep):
    """The same by other means: nothing is dropped, but from `layer` on nobody looks at what FastV would drop."""
    model = copy.deepcopy(lvlm.model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = model(**inputs, output_attentions=True).attentions[layer - 1]
    scores = attention.float().mean(1)[:, -1]
    hidden = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (ids, score) in enumerate(zip(inputs["input_ids"], scores, strict=True)):
        visual = (ids == lvlm.anatomy.image_token_id).nonzero().flatten().tolist()
        ordered = sorted(visual, key=lambda j: (-float(score[j]), j))
        hidden[row, ordered[int(len(visual) * keep + 0.5) :]] = True
    model.set_attn_implementation("sdpa")
    padding = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    def blind(_, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        queries = state.shape[1]
        keys = queries if queries > 1 else cache.get_seq_length()
        seen = torch.ones(len(hidden), keys, dtype=torch.bool)
        seen[:, : hidden.shape[1]] = padding & ~hidden
        given = kwargs["attention_mask"]
        if given is None:
            given = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return args, {**kwargs, "attention_mask": (seen[:, None, None] & given)}

    for block in model.get_submodule(lvlm.anatomy.layers)[layer:]:
        block.register_forward_pre_hook(blind, with_kwargs=True)
    return model, hidden


@pytest.mark.parametrize("family", SEEING)
def test_dropping_tokens_is_looking_at_them_no_more(family):
    lvlm, made = lvlm_of(family)
    reference, hidden = masked(lvlm, made.inputs, layer=2, keep=0.5)
    assert hidden.any()
    dropping = Fastv(layer=2, keep=0.5).apply(lvlm)
    (words, expected), (ours, found) = (generate(m, made.inputs) for m in (reference, dropping.model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, words)
    assert (logits(lvlm.model, made.inputs)[:, -1] - expected[0]).abs().max() > 1e-3  # it makes a difference


@pytest.mark.parametrize("family", SLIDING)
def test_windows_shorter_than_the_prompt_are_refused(family):
    lvlm, made = lvlm_of(family)
    dropping = Fastv(layer=2, keep=0.5).apply(lvlm)
    with pytest.raises(SvlError, match="masks that FastV cannot shorten"):
        generate(dropping.model, made.inputs)


def test_batches_of_unequal_pictures(qwen, samples, encode):
    inputs = encode(qwen, samples.samples)
    reference, hidden = masked(qwen, inputs, layer=1, keep=0.3)
    assert len(set(hidden.sum(1).tolist())) > 1
    assert not inputs["attention_mask"].all()
    found = Fastv(layer=1, keep=0.3).apply(qwen)
    (words, expected), (ours, numbers) = (generate(m, inputs) for m in (reference, found.model))
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, words)


def test_later_layers_compute_and_cache_less(llava, samples, encode):
    inputs = encode(llava, samples.samples)
    found = Fastv(layer=2, keep=0.25).apply(llava)
    lengths = []
    for layer in found.layers:
        layer.register_forward_hook(
            lambda _, args, kwargs, out: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    with torch.inference_mode():
        cache = found.model(**inputs, use_cache=True).past_key_values
    t = inputs["input_ids"].shape[1]
    assert lengths == [t, t, t - 12, t - 12]  # 12 of 16 visual tokens go
    assert [layer.keys.shape[2] for layer in cache.layers] == [t, t, t - 12, t - 12]


def test_all_tokens_kept_and_no_picture_change_nothing(vlm, samples, encode, make_samples):
    everything = Fastv(layer=1, keep=1.0).apply(vlm)
    some = Fastv(layer=1, keep=0.0).apply(vlm)
    inputs, text = encode(vlm, samples.samples), encode(vlm, make_samples([3, 5], image=False).samples)
    for (a, x), (b, y) in (
        (generate(vlm.model, inputs), generate(everything.model, inputs)),
        (generate(vlm.model, text), generate(some.model, text)),
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_layers_count_those_that_are_left(llava, samples, encode):
    inputs = encode(llava, samples.samples)
    pruned = surgery.apply(llava, Plan(4, (1,)))
    reference, _ = masked(pruned, inputs, layer=2, keep=0.5)
    found = Fastv(layer=2, keep=0.5).apply(pruned)
    torch.testing.assert_close(
        logits(found.model, inputs)[:, -1], logits(reference, inputs)[:, -1], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(SvlError, match=r"layer is 3, but 'llava' has 3 layers"):
        Fastv(layer=3).apply(pruned)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer is 0, but must be at least 1"),
        ({"keep": 1.5}, "keep is 1.5, but must be at least 0 and at most 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(SvlError, match=message):
        Fastv(**settings)


def test_text_models_have_no_visual_tokens(llama):
    with pytest.raises(SvlError, match="no visual tokens to drop"):
        Fastv().apply(llama)


# ------------------------------------------------------------------------------------------------- quantisation


@pytest.fixture
def torchao():
    pytest.importorskip("torchao")
    from svl.quantization import torchao as module

    return module.Torchao


def test_int8_weights_are_the_nearest_of_255(torchao, llava, samples, encode):
    inputs = encode(llava, samples.samples)
    before = logits(llava.model, inputs)
    found = torchao().apply(llava)
    assert torch.equal(logits(llava.model, inputs), before)  # the dense model stays
    for ours, theirs in zip(found.layers, llava.layers, strict=True):
        weight, original = ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight
        scale = original.abs().amax(1, keepdim=True) / 127
        assert weight.qdata.dtype == torch.int8
        assert ((weight.dequantize() - original).abs() <= 0.51 * scale + 1e-6).all()
    assert found.model.lm_head.weight is not None
    assert torch.equal(found.model.lm_head.weight, llava.model.lm_head.weight)
    reference = surgery.apply(llava, Plan(4, ()))
    for ours, copied in zip(found.layers, reference.layers, strict=True):
        for name, module in copied.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(ours.get_submodule(name).weight.dequantize(), requires_grad=False)
    torch.testing.assert_close(logits(found.model, inputs), logits(reference.model, inputs), rtol=1e-3, atol=1e-3)


def test_both_together(torchao, llava, samples, encode):
    inputs = encode(llava, samples.samples)
    quantised = torchao().apply(surgery.apply(llava, Plan(4, (2,))))
    both = Fastv(layer=1, keep=0.5).apply(quantised)
    reference, _ = masked(quantised, inputs, layer=1, keep=0.5)
    torch.testing.assert_close(
        logits(both.model, inputs)[:, -1], logits(reference, inputs)[:, -1], rtol=1e-4, atol=1e-4
    )


def test_unknown_configuration_is_named(torchao):
    with pytest.raises(SvlError, match=r"quantization.config is 'Int8WeightOnly'.*did you mean 'Int8WeightOnlyConfig'"):
        torchao(config="Int8WeightOnly")
    with pytest.raises(SvlError, match="options do not fit"):
        torchao(options={"bits": 3})


# --------------------------------------------------------------------------------------------------------- runs


def test_runs_measure_each_alone_and_all_together(torchao, tmp_path):
    """Pruning, int8 weights and fewer visual tokens as options of a run: what each saves, and all together."""
    config.register_with_hydra()
    found = {}
    for strategy, n in (("identity", 16), ("tail", 12)):
        for words in ([], ["quantization=int8"], ["visual_tokens=fastv"], ["quantization=int8", "visual_tokens=fastv"]):
            settings = [f"strategy={strategy}", "n_remove=4", "tracker=none", "model.device=cpu", *words]
            settings += ["benchmark=demo", "benchmark.limit=2", "calibration.samples=2"]
            settings += ["~benchmark.tasks.svl_demo_choice", "~benchmark.tasks.svl_demo_existence"]
            settings += ["efficiency=default", "efficiency.repeats=1", "efficiency.new_tokens=2"]
            settings += [f"paths.store={tmp_path}/store", f"paths.outputs={tmp_path}"]
            with initialize_config_dir(str(config.CONF), version_base="1.3"):
                result = pipeline.run_configuration(compose("config", overrides=settings), tmp_path)
            used = tuple(word.partition("=")[2] for word in words)
            assert [*result["settings"].get("combined", {})] == [word.partition("=")[0] for word in words]
            assert len(result["scores"]) == 1
            if result["efficiency"] is None:
                assert (strategy, used) == ("identity", ())
                continue
            assert result["efficiency"]["dense"]["layers"] == 16
            assert result["efficiency"]["pruned"]["layers"] == n
            found[strategy, used] = result["efficiency"]["pruned"]
    dense = result["efficiency"]["dense"]
    for strategy in ("identity", "tail"):
        plain = found.get((strategy, ()), dense)
        int8, fastv, both = (found[strategy, used] for used in (("int8",), ("fastv",), ("int8", "fastv")))
        assert int8["bytes"] == both["bytes"] < plain["bytes"] == fastv["bytes"]
        assert fastv["cache_bytes"] == both["cache_bytes"] < plain["cache_bytes"] == int8["cache_bytes"]
        assert fastv["prefill_flops"] == both["prefill_flops"] < plain["prefill_flops"] == int8["prefill_flops"]
    scores = [json.loads(f.read_text())["inputs"] for f in (tmp_path / "store" / "score").glob("*/manifest.json")]
    assert len(scores) == 8
    assert sum(not inputs["removed"] and "combined" not in inputs for inputs in scores) == 1  # the dense model's


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(6, (0,), removed_attn=(2,)), r"visual_tokens\.layer is 2: tokens are chosen by the attention of layer 2"),
        (Plan(6, (0, 1, 2, 3)), r"visual_tokens\.layer is 2, but the plan leaves 2 layers"),
    ],
)
def test_plans_that_leave_nothing_to_choose_by_are_refused_before_anything_is_evaluated(
    plan, says, tmp_path, monkeypatch
):
    with pytest.raises(SvlError, match=says):
        Fastv(2).check_plan(plan)
    Fastv(1).check_plan(plan)
    monkeypatch.setattr(pipeline.ModelVariant, "evaluate", lambda *_: pytest.fail("evaluated nevertheless"))
    words = ["strategy=manual", f"strategy.layers={list(range(14)) if len(plan.removed) > 1 else [0]}"]
    words += ["strategy.attn=[2]"] if len(plan.removed) == 1 else []
    words += ["visual_tokens=fastv", "benchmark=smoke", "benchmark.limit=1", "tracker=none", "model.device=cpu"]
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*words, f"paths.store={tmp_path}", f"paths.outputs={tmp_path}"])
    with pytest.raises(SvlError, match=says):
        pipeline.Run(cfg, tmp_path).execute()
