"""The pruned model is the full model without the removed layers, in memory."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import svl
from svl.core import Patch, Plan, SvlError, Update
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.pruning import selfcheck
from svl.pruning.pruned_config import pruned_config, pruned_fields
from svl.pruning.surgery import apply

REMOVED = [(1,), (0, 3), (1, 2), (0, 1, 2), (1, 2, 3)]
UPDATE = Update(torch.randn(32, 2, generator=torch.Generator().manual_seed(1)) / 6,
                torch.randn(2, 32, generator=torch.Generator().manual_seed(2)) / 6)  # fmt: skip


@contextmanager
def skipped(lvlm, removed):
    """The full model whose `removed` layers run (and fill their cache), but pass on their input."""
    handles = [
        lvlm.layers[i].register_forward_hook(
            lambda _, args, out: (args[0], *out[1:]) if type(out) is tuple else args[0]
        )
        for i in removed
    ]
    yield lvlm.model
    for handle in handles:
        handle.remove()


def forward(model, inputs) -> torch.Tensor:
    """Logits of the positions that are not padding."""
    with torch.inference_mode():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def assert_same_generation(a, b, exactly: bool = False) -> None:
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, atol=0 if exactly else 1e-5, rtol=0)


# ----------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("removed", REMOVED, ids=str)
def test_pruned_model_equals_the_full_model_with_layers_skipped(removed, lm, samples, encode, generate):
    inputs = encode(lm, samples.samples[:3])
    pruned = apply(lm, Plan(4, removed))
    with skipped(lm, removed) as reference:
        expected, generated = forward(reference, inputs), generate(reference, inputs)
    torch.testing.assert_close(forward(pruned.model, inputs), expected, atol=1e-6, rtol=0)
    assert (forward(lm.model, inputs) - expected).abs().max() > 0.1  # removing them means something
    ours = generate(pruned.model, inputs)
    assert_same_generation(ours, generated)
    assert len(ours.past_key_values.layers) == 4 - len(removed) == len(pruned.layers)


def test_cached_generation_equals_generation_without_cache(lm, samples, encode, generate):
    pruned, inputs = apply(lm, Plan(4, (0, 2))), encode(lm, samples.samples[:3])
    assert_same_generation(generate(pruned.model, inputs), generate(pruned.model, inputs, use_cache=False))


def test_removing_nothing_gives_the_dense_logits_bit_for_bit(lm, samples, encode, generate):
    inputs = encode(lm, samples.samples)
    same = apply(lm, Plan(4, ()), Patch())
    assert torch.equal(forward(same.model, inputs), forward(lm.model, inputs))
    assert_same_generation(generate(same.model, inputs), generate(lm.model, inputs), exactly=True)


def test_pruned_models_can_be_calibrated_and_pruned_again(vlm, samples, encode):
    from svl.calibration.calibrate import calibrate

    once = apply(vlm, Plan(4, (1,)))
    twice = apply(once, Plan(3, (1,)))
    assert [t.cosine.shape[0] for t in calibrate(twice, samples).traces] == [2] * 5
    inputs = encode(vlm, samples.samples)
    assert torch.equal(forward(twice.model, inputs), forward(apply(vlm, Plan(4, (1, 2))).model, inputs))


def test_half_precision_is_pruned_exactly(checkpoint, samples, encode):
    """Positions stay in fp32, whatever the weights are."""
    lvlm = svl.load(checkpoint("llava"), device="cpu", dtype="bfloat16")
    pruned, inputs = apply(lvlm, Plan(4, (1, 2))).model, encode(lvlm, samples.samples)
    with skipped(lvlm, (1, 2)) as reference:
        assert torch.equal(forward(pruned, inputs), forward(reference, inputs))
    assert pruned.dtype == torch.bfloat16
    assert pruned.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_embeddings_stay_tied(llama, randomise, tmp_path):
    config = copy.deepcopy(llama.model.config)
    config.tie_word_embeddings = True
    model = randomise(type(llama.model)(config))
    pruned = apply(replace(llama, model=model), Plan(4, (1,)))
    assert pruned.model.lm_head.weight is pruned.model.model.embed_tokens.weight
    assert pruned.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    pruned.model.save_pretrained(tmp_path / "tied")
    again, info = type(model).from_pretrained(tmp_path / "tied", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.arange(9)[None]
    torch.testing.assert_close(again.eval()(ids).logits, pruned.model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config_says", [True, False])
def test_heads_are_tied_as_in_the_dense_model_whatever_the_config_says(config_says, llama, randomise, tmp_path):
    """A checkpoint may store a head of its own under a config that says tied: it is loaded apart, and stays so."""
    config = copy.deepcopy(llama.model.config)
    config.tie_word_embeddings = False
    source = randomise(type(llama.model)(config))
    source.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": config_says}))
    model = type(llama.model).from_pretrained(tmp_path).eval()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    lvlm, plan = replace(llama, model=model), Plan(4, (1,))
    pruned = apply(lvlm, plan).model
    assert pruned.lm_head.weight is not pruned.model.embed_tokens.weight
    assert torch.equal(pruned.lm_head.weight, source.lm_head.weight)
    ids = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    with skipped(lvlm, (1,)) as reference:
        expected = forward(reference, ids)
    torch.testing.assert_close(forward(pruned, ids), expected, atol=1e-6, rtol=0)
    pruned.save_pretrained(tmp_path / "pruned")
    again = type(model).from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(forward(again, ids), expected, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------- the dense model stays


def test_the_dense_model_is_never_touched(lm, samples, encode):
    inputs = encode(lm, samples.samples)
    forward(lm.model, inputs)  # transformers installs hooks of its own on first use
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()]
    before = {n: (id(p), p._version, p.data_ptr(), p.requires_grad, p.clone()) for n, p in lm.model.named_parameters()}
    config, modules = lm.model.config.to_json_string(), [id(m) for m in lm.model.modules()]
    pruned = apply(lm, Plan(4, (0, 2)), Patch({(1, "mlp"): UPDATE, (3, "attn"): UPDATE}))
    forward(pruned.model, inputs)
    del pruned
    for name, p in lm.model.named_parameters():
        assert (id(p), p._version, p.data_ptr(), p.requires_grad) == before[name][:4]
        assert torch.equal(p, before[name][4])
    assert [id(m) for m in lm.model.modules()] == modules
    assert lm.model.config.to_json_string() == config
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in lm.model.modules()] == hooks


def test_unchanged_weights_are_shared_not_copied(lm):
    dense = lm.model.state_dict()
    pruned = apply(lm, Plan(4, (1,)), Patch({(2, "mlp"): UPDATE}))
    path, changed = lm.anatomy.layers, []
    for name, tensor in pruned.model.state_dict().items():
        old = (
            name.replace(f"{path}.1.", f"{path}.2.")
            if f"{path}.1." in name
            else name.replace(f"{path}.2.", f"{path}.3.")
        )
        if dense[old].data_ptr() != tensor.data_ptr():
            changed.append(old)
    assert changed == [n for n in (f"{path}.2.mlp.down_proj.weight", f"{path}.2.mlp.down_proj.bias") if n in dense]


# ------------------------------------------------------------------------------------------------ patch


@pytest.mark.parametrize("role", ["attn", "mlp"])
def test_a_patch_multiplies_what_the_named_projection_writes(role, lm, samples, encode):
    """With its bias: (I + left right) (W x + b), seen where the projection adds to the residual stream."""
    pruned = apply(lm, Plan(4, (2,)), Patch({(1, role): UPDATE}))
    reference = apply(lm, Plan(4, (2,)))
    writer = reference.layers[1].get_submodule(lm.anatomy.writers[role][1].module)
    writer.register_forward_hook(lambda _, __, out: out + out @ (UPDATE.left @ UPDATE.right).T)
    inputs = encode(lm, samples.samples)
    assert (writer.bias is not None) == (lm.name == "llama")
    torch.testing.assert_close(forward(pruned.model, inputs), forward(reference.model, inputs), atol=1e-4, rtol=1e-4)
    assert (forward(pruned.model, inputs) - forward(apply(lm, Plan(4, (2,))).model, inputs)).abs().max() > 1e-2


def test_added_matrices_and_shifts_go_to_the_one_projection(llama, samples, encode):
    delta, shift = torch.randn(32, 48) / 8, torch.randn(32)
    pruned = apply(llama, Plan(4, (2,)), Patch({(1, "mlp"): Update(delta=delta, shift=shift)}))
    writer, dense = pruned.layers[1].mlp.down_proj, llama.layers[1].mlp.down_proj
    torch.testing.assert_close(writer.weight, dense.weight + delta)
    torch.testing.assert_close(writer.bias, dense.bias + shift)


# ------------------------------------------------------------------------------------------------ self-check


def test_the_self_check_passes_what_is_right(lm):
    inputs = selfcheck.example_inputs(lm)
    assert lm.anatomy.image_token_id in [*inputs["input_ids"].flatten().tolist(), None]
    assert ("pixel_values" in inputs) == lm.takes_images
    before = [list(layer._forward_hooks) for layer in lm.layers]  # transformers leaves some of its own
    for removed in REMOVED:
        plan = Plan(4, removed)
        assert selfcheck.check_surgery(lm, apply(lm, plan), plan, inputs) < 1e-6
        assert [list(layer._forward_hooks) for layer in lm.layers] == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_stops_what_is_wrong(dtype, checkpoint):
    """Another layer removed than planned, two layers swapped, one weight changed a little."""
    lvlm = svl.load(checkpoint("llava"), device="cpu", dtype=dtype)
    plan, inputs = Plan(4, (1,)), selfcheck.example_inputs(lvlm)
    swapped = apply(lvlm, plan)
    swapped.layers[0], swapped.layers[1] = swapped.layers[1], swapped.layers[0]
    touched = apply(lvlm, plan, Patch({(2, "mlp"): UPDATE}))
    broken = apply(lvlm, plan)
    broken.layers[0].mlp.down_proj.weight = torch.nn.Parameter(broken.layers[0].mlp.down_proj.weight * float("nan"))
    for wrong in (apply(lvlm, Plan(4, (2,))), swapped, touched, broken):
        with pytest.raises(SvlError, match=r"surgery on 'llava' failed its check: without layers \[1\], logits are"):
            selfcheck.check_surgery(lvlm, wrong, plan, inputs)
    assert selfcheck.check_surgery(lvlm, apply(lvlm, plan), plan, inputs) < 1e-2


def test_the_self_check_works_without_a_template(checkpoint, caplog):
    lvlm = svl.load(checkpoint("llava"), device="cpu", name="untemplated")
    lvlm.processor.chat_template = None
    inputs, plan = selfcheck.example_inputs(lvlm), Plan(4, (1,))
    assert "pixel_values" not in inputs
    with caplog.at_level("INFO"):
        assert selfcheck.check_surgery(lvlm, apply(lvlm, plan), plan, inputs) < 1e-2
    assert "no chat template" in caplog.text


# ----------------------------------------------------------------------------------------------- errors


def test_plans_that_do_not_fit_are_refused(llava):
    with pytest.raises(SvlError, match="plan is for 5 decoder layers, but 'llava' has 4"):
        apply(llava, Plan(5, (1,)))
    protected = replace(llava, anatomy=replace(llava.anatomy, protected={0: "it starts", 1: "it matters"}))
    with pytest.raises(SvlError, match=r"removes layers \[1\], which 'llava' needs: it matters \(protect=none removes"):
        apply(protected, Plan(4, (1, 2)))


@pytest.mark.parametrize("key", [(1, "mlp"), (0, "router")])
def test_patches_of_absent_weights_are_refused(key, llava):
    with pytest.raises(SvlError, match="the pruned model does not have"):
        apply(llava, Plan(4, (1,)), Patch({key: UPDATE}))


# ----------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("field", "value", "pruned"),
    [
        ("layer_types", ["full_attention", "conv", "conv", "moe"], ["full_attention", "moe"]),
        ("cross_attention_layers", [1, 3], [1]),
        ("moe_layers", [0, 1, 2, 3], [0, 1]),  # an index set, though as long as the model is deep
        ("max_window_layers", 2, 1),
        ("first_k_dense_replace", 4, 2),
        ("num_kv_shared_layers", 2, 1),
        ("num_kv_shared_layers", 0, 0),
        ("other", [1, 2, 3], [1, 2, 3]),  # not per layer
        ("other_token_ids", [1, 2, 3, 4], [1, 2, 3, 4]),  # nor is this
    ],
)
def test_depth_dependent_config_fields_follow_the_plan(field, value, pruned, llama):
    config = copy.deepcopy(llama.model.config)
    setattr(config, field, value)
    new = pruned_config(config, Plan(4, (1, 2)))
    assert getattr(new, field) == pruned
    assert new.num_hidden_layers == 2
    assert (config.num_hidden_layers, getattr(config, field)) == (4, value)


def test_the_text_part_of_a_config_is_pruned_and_no_other(vlm):
    """Vision towers here are as deep as the decoder."""
    new = pruned_config(vlm.model.config, Plan(4, (1, 2)))
    assert new.text_config.num_hidden_layers == 2
    assert new.vision_config.num_hidden_layers == 4
    if vlm.name == "qwen":
        assert new.text_config.layer_types == ["full_attention"] * 2


def test_fields_by_layer_number_follow_the_plan():
    fields = {"num_hidden_layers": 4, "per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 16}}}
    assert pruned_fields(fields, Plan(4, (0, 1))) == {"num_hidden_layers": 2, "per_layer_config": {1: {"head_dim": 16}}}


@pytest.mark.parametrize("removed", [(1,), (0, 3), (2, 3, 4)], ids=str)
def test_layers_with_experts_at_intervals_become_a_list(removed):
    """Every second layer but layer 3 has experts: what is left of them has, whatever its new number."""
    plan = Plan(6, removed)
    fields = pruned_fields({"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}, plan)
    assert fields["decoder_sparse_step"] == 1
    sparse = [i for i in range(6) if (i + 1) % 2 == 0 and i != 3]
    assert [i not in fields["mlp_only_layers"] for i in range(len(plan.kept))] == [i in sparse for i in plan.kept]


def test_a_config_that_would_be_read_otherwise_is_refused(llama):
    class Stubborn(type(llama.model.config)):
        """Wants two layers."""

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.num_hidden_layers = max(2, self.num_hidden_layers)

    config = Stubborn(**{k: v for k, v in llama.model.config.to_dict().items() if k != "model_type"})
    assert pruned_config(config, Plan(4, (0, 1))).num_hidden_layers == 2
    with pytest.raises(SvlError, match=r"llama cannot do without layers \[0, 1, 2\]: with 'num_hidden_layers' 1, it"):
        pruned_config(config, Plan(4, (0, 1, 2)))


def tiny_causal_lm(kind, **fields):
    """A model of a family, of 4 layers of width 32; `fields` count them."""
    sizes = {"vocab_size": 24, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "hidden_size": 32, "d_model": 32, "n_heads": 4}
    sizes |= {"num_decoder_attention_heads": 4, "decoder_start_token_id": 1}
    config = AutoConfig.for_model(kind, **sizes, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mpt", {"n_layers": 4, "max_seq_len": 16}),
        ("trocr", {"decoder_layers": 4}),
        ("bart", {"encoder_layers": 4, "decoder_layers": 4, "is_encoder_decoder": False}),
        ("prophetnet", {"num_encoder_layers": 4, "num_decoder_layers": 4, "is_encoder_decoder": False}),
    ],
)
def test_layers_are_counted_by_fields_of_many_names(kind, fields):
    model = tiny_causal_lm(kind, **fields)
    lvlm = Lvlm(model, None, find_anatomy(model), kind)
    pruned = apply(lvlm, Plan(4, (1,)))
    assert len(pruned.layers) == pruned.model.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 4


def test_a_config_of_which_no_known_field_counts_the_layers_is_refused(llama):
    class Storeys(type(llama.model.config)):
        """Calls its depth otherwise."""

        attribute_map: ClassVar = {"num_hidden_layers": "storeys"}

    config = Storeys(**{k: v for k, v in llama.model.config.to_dict().items() if k != "model_type"})
    assert "num_hidden_layers" not in config.to_dict()
    with pytest.raises(
        SvlError, match=r"llama cannot do without layers \[1\]: its config counts layers in none of the"
    ):
        pruned_config(config, Plan(4, (1,)))


def test_unknown_fields_that_may_be_per_layer_are_refused(llama):
    config = copy.deepcopy(llama.model.config)
    config.layer_magic = [1, 2, 3, 4]
    with pytest.raises(SvlError, match="'layer_magic' of llama may be per-layer"):
        pruned_config(config, Plan(4, (1,)))
    assert pruned_config(config, Plan(4, ())).layer_magic == [1, 2, 3, 4]  # nothing to prune, nothing to refuse
