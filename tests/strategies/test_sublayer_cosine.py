"""Scores of attention and MLP against states of single forward passes; which sub-layers go."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.families import POST_NORM, SUPPORTED, lvlm_of
from helpers.streams import record
from torch.nn import functional as F

from svl.calibration.calibrate import calibrate, select
from svl.calibration.hooks import sublayer_hooks
from svl.core import Plan, Stats, SvlError, TokenTrace
from svl.models.lvlm import Lvlm
from svl.selectors.all_tokens import All
from svl.strategies.cosine import Cosine
from svl.strategies.sublayer_cosine import SublayerCosine

REFUSED = {*POST_NORM, "mllama"}  # which gates what its cross-attention writes


def given(attn, mlp) -> Stats:
    """Statistics of one token with these cosines."""
    trace = TokenTrace(0, torch.zeros(1, dtype=torch.bool), sublayers=torch.tensor([attn, mlp])[..., None])
    return Stats(len(attn), tuple(range(len(attn))), [trace], All())


def test_scores_are_those_of_each_part(lm, samples, encode):
    """x + attention, then + MLP: the states between are built from what projections wrote."""
    stats = select(calibrate(lm, samples, statistics=["sublayers"], batch_size=2), All())
    expected = torch.zeros(2, 4, dtype=torch.float64)
    seen = record(lm, samples, encode)
    for i in range(4):
        between = [s.states[i] + s.writes[i, "attn"] for s in seen]
        parts = [(F.cosine_similarity(s.states[i], mid, dim=-1), F.cosine_similarity(mid, s.states[i + 1], dim=-1))
                 for s, mid in zip(seen, between, strict=True)]  # fmt: skip
        expected[:, i] = torch.stack([torch.cat(part).mean() for part in zip(*parts, strict=True)])
    torch.testing.assert_close(stats.sublayers(), expected, atol=1e-5, rtol=0)
    order = expected[0].argsort(descending=True).tolist()
    assert SublayerCosine(("attn",)).plan(stats, 2).removed_attn == tuple(sorted(order[:2]))


def test_the_most_similar_go():
    stats = given([0.1, 0.9, 0.5, 0.7], [0.3, 0.8, 0.6, 0.95])
    assert SublayerCosine(("attn",)).plan(stats, 2) == Plan(4, (), removed_attn=(1, 3))
    assert SublayerCosine(("mlp",)).plan(stats, 2) == Plan(4, (), removed_mlp=(1, 3))
    assert SublayerCosine().plan(stats, 2) == Plan(4, (), removed_attn=(1,), removed_mlp=(3,))
    assert SublayerCosine().plan(stats, 3) == Plan(4, (1,), removed_mlp=(3,))  # both parts of layer 1
    assert SublayerCosine().plan(stats, 0) == Plan(4, ())
    assert SublayerCosine().plan(replace(stats, removable=(0, 2)), 1) == Plan(4, (), removed_mlp=(2,))
    assert SublayerCosine(("attn",)).plan(given([0.5] * 4, [0.5] * 4), 2).removed_attn == (2, 3)


def test_settings_are_checked():
    with pytest.raises(SvlError, match=r"strategy\.targets is 'ffn', but must be one of: attn, mlp"):
        SublayerCosine(("ffn",))
    with pytest.raises(SvlError, match=r"strategy\.targets is empty"):
        SublayerCosine(())


@pytest.mark.parametrize("family", SUPPORTED)
def test_families_are_measured_or_refused_in_one_line(family):
    """Those that normalise what a sub-layer writes are refused; whoever is measured adds up."""
    lvlm, made = lvlm_of(family)
    cosines: dict[int, torch.Tensor] = {}
    refusal = pytest.raises(SvlError, match="adds something else than attention and MLP write")
    with refusal if family in REFUSED else nullcontext(), sublayer_hooks(lvlm, cosines), torch.inference_mode():
        lvlm.model(**made.inputs)
    if family in REFUSED:
        return
    assert sorted(cosines) == list(range(lvlm.anatomy.n_layers))
    assert all(bool((c.abs() <= 1 + 1e-5).all()) for c in cosines.values())


def massive(family: str, size: float) -> tuple[Lvlm, dict[str, torch.Tensor]]:
    """A model one channel of whose first token is huge."""
    lvlm, made = lvlm_of(family)
    model = copy.deepcopy(lvlm.model)
    model.get_input_embeddings().weight[int(made.inputs["input_ids"][0, 0]), 3] = size
    return replace(lvlm, model=model), made.inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100, 300, 3000])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama", "qwen3"])
def test_a_massive_activation_hides_no_norm(family, size, dtype):
    lvlm, inputs = massive(family, size)
    lvlm = replace(lvlm, model=lvlm.model.to(dtype))
    refusal = pytest.raises(SvlError, match="adds something else than attention and MLP write")
    with refusal if family in REFUSED else nullcontext(), sublayer_hooks(lvlm, {}), torch.inference_mode():
        lvlm.model(**inputs)


@pytest.mark.parametrize("spoil", [lambda w: w[3].fill_(float("nan")), lambda w: w.mul_(1e30)])
def test_states_that_are_not_finite_are_refused_as_by_other_cosines(spoil, lm, samples):
    """NaN, and states that are finite but whose norms are not."""
    model = copy.deepcopy(lm.model)
    broken = replace(lm, model=model)
    with torch.no_grad():
        spoil(broken.layers[2].mlp.down_proj.weight)
    stats = select(calibrate(broken, samples, statistics=["cosine", "sublayers"], batch_size=2), All())
    for strategy in (SublayerCosine(), SublayerCosine(("mlp",)), Cosine()):
        with pytest.raises(SvlError, match="layer importance is not finite"):
            strategy.plan(stats, 2)
