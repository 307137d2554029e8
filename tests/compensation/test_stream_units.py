"""Models that multiply what a layer writes before they add it to the residual stream: fits know by how much."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.families import lvlm_of
from helpers.methods import method
from helpers.streams import record
from transformers import GraniteConfig, GraniteForCausalLM, OPTConfig, OPTForCausalLM

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.compensation.linear_cosine import LinearCosine
from svl.core import Plan, SvlError, fitted_patch
from svl.models.anatomy import find_anatomy
from svl.pruning import layer_trials
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All

MULTIPLIER = 0.22
FOLDING = ["linear", "linear_replaceme", "linear_cosine", "mean_update", "subspace_fit", "refit", "subspace_guarded"]


@pytest.fixture(scope="module")
def granite(llama, randomise):
    config = GraniteConfig(
        vocab_size=llama.model.config.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, residual_multiplier=MULTIPLIER, embedding_multiplier=2.0,
        logits_scaling=1.0, attention_multiplier=0.35, mlp_bias=False, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return with_model(llama, randomise(GraniteForCausalLM(config)))


@pytest.fixture(scope="module")
def with_bias(llama, randomise):
    """A Granite whose MLPs end in a bias."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    size = {"vocab_size": llama.model.config.vocab_size, "num_key_value_heads": 4, "mlp_bias": True}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = GraniteForCausalLM(GraniteConfig(**fields, **size, **ids, residual_multiplier=0.5))
    return with_model(llama, randomise(model))


def with_model(llama, model):
    model = model.eval().requires_grad_(False)
    return replace(llama, model=model, anatomy=find_anatomy(model), name=model.config.model_type)


def folded(lvlm):
    """The same function, whose writers' weights hold the multiplier."""
    model = copy.deepcopy(lvlm.model)
    with torch.no_grad():
        for layer in model.model.layers:
            for name, p in layer.named_parameters():
                if "o_proj" in name or "down_proj" in name:  # biases, too
                    p.mul_(model.config.residual_multiplier)
            layer.residual_multiplier = 1.0
    model.config.residual_multiplier = 1.0
    return replace(lvlm, model=model)


def states_of(lvlm, samples):
    return Activations(lvlm, samples, select(calibrate(lvlm, samples, statistics=()), All()))


def logits_of(lvlm, inputs):
    with torch.inference_mode():
        return lvlm.model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("removed", [(2,), (2, 3)])
def test_a_multiplier_and_the_weights_that_hold_it_are_one_model(granite, make_samples, encode, name, removed):
    samples, plan, found = make_samples([13] * 8, image=False), Plan(5, removed), []
    inputs = encode(granite, samples.samples[:4])
    models = (granite, folded(granite))
    torch.testing.assert_close(logits_of(models[0], inputs), logits_of(models[1], inputs), atol=1e-4, rtol=1e-4)
    for lvlm in models:
        compensation = LinearCosine(lr=3e-3) if name == "linear_cosine" else method("compensation", name)
        patch = fitted_patch(compensation, states_of(lvlm, samples), plan)
        found.append((logits_of(apply(lvlm, plan, patch), inputs), patch.notes))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-3, rtol=2e-3)
    assert found[0][1] == found[1][1]


def test_a_bias_takes_the_mean_update_divided_by_the_multiplier(with_bias, make_samples, encode):
    samples, plan = make_samples([13] * 8, image=False), Plan(4, (2,))
    inputs = encode(with_bias, samples.samples[:4])
    found = []
    for lvlm in (with_bias, folded(with_bias)):
        patch = fitted_patch(method("compensation", "mean_update"), states_of(lvlm, samples), plan)
        assert patch.updates[1, "mlp"].shift is not None
        found.append(logits_of(apply(lvlm, plan, patch), inputs))
    torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)


def test_factors_are_measured_for_every_layer(granite):
    """Layers of one kind may have gates of their own; a gate for each channel is no factor."""
    lvlm = replace(granite, model=copy.deepcopy(granite.model))
    factors = [0.1, 1.0, -0.4, 3.0, 0.7]
    for layer, factor in zip(lvlm.layers, factors, strict=True):
        layer.residual_multiplier = factor
    found = layer_trials.stream_factors(lvlm, range(5))
    expected = {(i, role): factor for i, factor in enumerate(factors) for role in ("attn", "mlp")}
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[1, "attn"] == found[1, "mlp"] == 1.0  # exactly
    layer_trials.check_folding(lvlm)
    lvlm.layers[3].residual_multiplier = torch.linspace(0.5, 1.5, 32)
    found = layer_trials.stream_factors(lvlm, (2, 3))
    assert (found[3, "attn"], found[3, "mlp"]) == (None, None)
    assert found[2, "mlp"] == pytest.approx(-0.4)


def test_a_gate_for_each_channel_is_refused_unless_all_is_scaled(granite, make_samples):
    lvlm = replace(granite, model=copy.deepcopy(granite.model))
    for layer in lvlm.layers:
        layer.residual_multiplier = torch.linspace(0.5, 1.5, 32)
    layer_trials.check_folding(lvlm, only_scales=True)
    assert method("compensation", "magnitude").only_scales
    with pytest.raises(
        SvlError, match=r"multiplies what self_attn\.o_proj\.weight writes by other numbers in other ch"
    ):
        layer_trials.check_folding(lvlm)
    hidden = states_of(lvlm, make_samples([5, 5], image=False))
    for name, said in (("linear", "so nothing can be fitted to it"), ("refit", "so none can be refitted")):
        with pytest.raises(SvlError, match=said):
            fitted_patch(method("compensation", name), hidden, Plan(5, (2,)))


def test_gates_of_mllama():
    """tanh(gate) in its cross-attention layers, whose MLPs add nothing to tokens before the picture."""
    lvlm, made = lvlm_of("mllama")
    found = layer_trials.stream_factors(lvlm, range(lvlm.anatomy.n_layers), made.inputs)
    for i, layer in enumerate(lvlm.layers):
        if hasattr(layer, "cross_attn_attn_gate"):
            assert found[i, "attn"] == pytest.approx(float(layer.cross_attn_attn_gate.tanh()), rel=1e-4)
            assert found[i, "mlp"] is None
        else:
            assert found[i, "attn"] == found[i, "mlp"] == 1.0


def test_projections_that_are_called_with_rows_of_tokens(llama, randomise, make_samples, encode):
    """OPT's: what they read and write is told sample by sample all the same, in batches with padding."""
    config = OPTConfig(
        vocab_size=llama.model.config.vocab_size, hidden_size=32, ffn_dim=48, num_hidden_layers=4,
        num_attention_heads=4, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = randomise(OPTForCausalLM(config))
    lvlm, samples = with_model(llama, model), make_samples([3, 9, 6, 12], image=False)
    hidden, flat = states_of(lvlm, samples), []
    handle = lvlm.layers[1].fc2.register_forward_hook(lambda _, args, output: flat.append(output))
    alone = record(lvlm, samples, encode)
    handle.remove()
    wanted = flat if flat[0].ndim == 2 else [written[0] for written in flat]
    assert len(alone) == len(wanted) == 4
    for sample, written in zip(hidden.stream(writers=[(1, "mlp")]), wanted, strict=True):
        torch.testing.assert_close(sample.wrote(1, "mlp"), written.float(), atol=1e-4, rtol=1e-4)
        assert sample.read(1, "mlp").shape == (len(written), 48)
    inputs, plan = encode(lvlm, samples.samples), Plan(4, (2,))
    dense, bare = logits_of(lvlm, inputs), logits_of(apply(lvlm, plan), inputs)
    for name in ("linear", "refit"):
        patch = fitted_patch(method("compensation", name), hidden, plan)
        assert float((logits_of(apply(lvlm, plan, patch), inputs) - dense).norm()) < float((bare - dense).norm())
