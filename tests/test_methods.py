"""Plans, strategies, selectors and compensations: by definition, at their limits, and in every combination."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import svl
from svl import config, pipeline, surgery
from svl.calibrate import Activations, calibrate, check_selector, measure, select
from svl.compensation.none import NoCompensation
from svl.compensation.subspace import Subspace
from svl.config import CONF, PACKAGE, build
from svl.core import Plan, Stats, SvlError, TokenTrace, did_you_mean, layers_to_remove, one_of
from svl.probe import ModelProbe
from svl.selectors.simple import All, Last, Random, Text, Visual
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine
from svl.strategies.identity import Identity
from svl.strategies.manual import Manual
from svl.strategies.random import Random as RandomLayers
from svl.strategies.tail import Tail
from svl.surgery import apply

GROUPS = ("strategy", "selector", "compensation")
FILES = {group: sorted(Path(CONF, group).glob("*.yaml")) for group in GROUPS}
# where the defaults do nothing on four layers
OPTIONS = {"manual": {"layers": [1, 3]}} | {
    f"shortened_{x}": {"protected": [0]} for x in ("ppl", "taylor", "magnitude")
}
COMBINATIONS = [  # all pairs
    (strategy, selector, compensation)
    for strategy, selector, compensation in itertools.product(*FILES.values())
    if strategy.stem == "shortgpt" or selector.stem == "tis" or compensation.stem == "none"
]


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    ("ratio", "depth", "n"),
    [(0.1, 32, 3), (0.2, 32, 6), (0.3, 32, 10), (0, 32, 0), (0.5, 5, 3), (0.25, 2, 1), (0.99, 4, 4), (0.125, 28, 4)],
)
def test_one_rounding_rule(ratio, depth, n):
    assert layers_to_remove(ratio, depth) == n


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_ratios_outside_the_unit_interval_are_refused(ratio):
    with pytest.raises(SvlError, match="must lie in"):
        layers_to_remove(ratio, 32)


def test_a_plan_survives_its_json():
    made = {"strategy": "x", "settings": {"p": 0.5}, "selector": None}
    plan = Plan(5, (3, 1), (0.5, 0.1, 0.3, 0.2, 0.9), ((2, (3,)), (0, (1,))), made)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.provenance == plan.provenance
    assert (again.removed, again.kept) == ((1, 3), (0, 2, 4))
    assert json.loads(plan.to_json())["kept"] == [0, 2, 4]
    assert Plan.from_json('{"n_layers": 4, "removed": [2]}') == Plan(4, (2,))
    assert Plan(4, (2,), provenance={"a": 1}) == Plan(
        4, (2,), provenance={"b": 2}
    )  # provenance is no part of its identity


def test_runs_are_the_contiguous_removed_layers():
    assert Plan(9, (3, 4, 7)).runs == ((3, 5), (7, 8))
    assert Plan(9, (8, 0, 1)).runs == ((0, 2), (8, 9))
    assert Plan(9, ()).runs == ()


@pytest.mark.parametrize(
    ("removed", "importance", "message"),
    [
        ((0, 1, 2), (), "all 3 decoder layers"),
        ((3,), (), r"layers \[3\], but the model has layers 0..2"),
        ((-1,), (), "but the model has layers 0..2"),
        ((1, 1), (), r"removes layers \[1, 1\]"),
        ((1,), (0.1, 0.2), "2 importances for 3 layers"),
    ],
)
def test_impossible_plans_are_refused(removed, importance, message):
    with pytest.raises(SvlError, match=message):
        Plan(3, removed, importance)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"n_layers": 4}', '{"n_layers": "x", "removed": []}', "null",
                                  '{"n_layers": 4, "removed": 3}', '{"n_layers": null, "removed": []}'])  # fmt: skip
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(SvlError, match="not a plan"):
        Plan.from_json(text)


def test_suggestions_come_from_what_is_allowed():
    assert did_you_mean("shortgtp", ["short_lvlm", "shortgpt", "tail"]) == " (did you mean 'shortgpt'?)"
    assert did_you_mean("zzz", ["tail"]) == ""
    one_of("rule", "nucleus", ("fraction", "nucleus"))
    with pytest.raises(SvlError, match=r"rule is 'nucles'.*fraction, nucleus \(did you mean 'nucleus'\?\)"):
        one_of("rule", "nucles", ("fraction", "nucleus"))


# ------------------------------------------------------------------------------------------- strategies


def trace(cosine: list[list[float]], visual: list[bool], index: int = 0) -> TokenTrace:
    return TokenTrace(index, torch.tensor(visual), torch.tensor(cosine))


TRACES = (trace([[0.9, 0.1], [0.5, 0.4], [0.2, 0.8]], [True, False]), trace([[0.3], [0.6], [0.4]], [False]))


@pytest.mark.parametrize(
    ("selector", "cosine"),
    [
        (All(), [1.3 / 3, 0.5, 1.4 / 3]),  # a mean over tokens, not over samples
        (Visual(), [0.9, 0.5, 0.2]),
        (Text(), [0.2, 0.5, 0.6]),
        (Last(), [0.2, 0.5, 0.6]),
    ],
)
def test_the_lowest_cosines_stay(selector, cosine):
    stats = Stats(3, (0, 1, 2), TRACES, selector)
    torch.testing.assert_close(stats.cosine(), torch.tensor(cosine, dtype=torch.float64))
    for n in range(3):
        plan = Cosine().plan(stats, n)
        assert plan.removed == tuple(sorted(sorted(range(3), key=lambda i: -cosine[i])[:n]))
        assert plan.importance == pytest.approx([1 - c for c in cosine])


def test_of_equal_layers_the_deeper_goes_first():
    assert Stats(4, (0, 1, 2, 3)).plan(torch.tensor([0.5, 0.1, 0.1, 0.1]), 2).removed == (2, 3)


def test_protected_layers_stay():
    stats = Stats(4, (1, 3))
    assert stats.plan(torch.tensor([0.0, 0.2, 0.0, 0.3]), 1).removed == (1,)
    for strategy in (Tail(), *(RandomLayers(seed) for seed in range(5))):
        assert strategy.plan(stats, 2).removed == (1, 3)
    with pytest.raises(SvlError, match="cannot remove 3 of 4 decoder layers: at most 2 may go"):
        Tail().plan(stats, 3)


@pytest.mark.parametrize("strategy", [Tail(), RandomLayers(), Cosine()])
@pytest.mark.parametrize("n", [-1, 3])
def test_impossible_numbers_of_layers_are_refused(strategy, n):
    with pytest.raises(SvlError, match=f"cannot remove {n} of 3"):
        strategy.plan(Stats(3, (0, 1, 2), TRACES, All()), n)


def test_baselines():
    stats = Stats(6, tuple(range(6)))
    assert Identity().plan(stats, 3).removed == ()
    assert Manual((4, 1)).plan(stats, 5).removed == (1, 4)
    assert Tail().plan(stats, 2).removed == (3, 4)  # the last stays ..
    assert Tail().plan(stats, 5).removed == (0, 1, 2, 3, 4)  # .. always
    plans = [RandomLayers(seed).plan(stats, n) for seed in range(9) for n in (2, 3)]
    assert plans[::2] == [RandomLayers(seed).plan(stats, 2) for seed in range(9)]  # by seed ..
    assert len({p.removed for p in plans[::2]}) > 3
    assert all(
        set(few.removed) < set(more.removed) for few, more in zip(plans[::2], plans[1::2], strict=True)
    )  # nested


def test_importance_must_be_finite():
    with pytest.raises(SvlError, match="layer importance is not finite"):
        Stats(2, (0, 1)).plan(torch.tensor([float("nan"), 0.1]), 1)
    with pytest.raises(SvlError, match="layer importance is not finite"):
        Cosine().plan(Stats(2, (0, 1), [trace([[0.1], [float("inf")]], [True])], All()), 1)


def test_a_selector_that_leaves_no_token_is_named(llama, make_samples):
    text = calibrate(llama, make_samples([3, 5], image=False))
    with pytest.raises(SvlError, match="selector 'visual' leaves no token"):
        select(text, Visual()).cosine()
    check_selector(llama, make_samples([3], image=False), Tis())  # needs a measurement: known later
    check_selector(llama, make_samples([3], image=False), Text())
    with pytest.raises(SvlError, match="selector 'visual' leaves no token"):
        check_selector(llama, make_samples([3], image=False), Visual())
    with pytest.raises(SvlError, match="selector 'all' leaves no token"):
        Stats(2, (0, 1), [], All()).cosine()
    with pytest.raises(SvlError, match="needs a token selector"):
        text.cosine()


# -------------------------------------------------------------------------------------------- selectors


def test_random_selects_a_fraction_by_seed_and_sample():
    tokens = [replace(TRACES[0], index=i, visual=torch.zeros(25, dtype=torch.bool)) for i in range(3)]
    assert [int(Random(p=p).weights(tokens[0]).sum()) for p in (0.28, 0.5, 0.01, 1.0)] == [7, 13, 1, 25]
    marks = [Random(seed=s).weights(t) for s in (0, 1) for t in tokens]
    assert len({tuple(m.tolist()) for m in marks}) == 6


@pytest.mark.parametrize("wrong", [{"p": 0}, {"p": 1.1}, {"rule": "top"}, {"pool": "all"}, {"layers": "last"},
                                   {"layers": "-1"}, {"text_self": "both"}])  # fmt: skip
def test_wrong_tis_settings_are_refused(wrong):
    with pytest.raises(SvlError, match=f"selector.{next(iter(wrong))}"):
        Tis(**wrong)


def test_tis_of_a_missing_layer_is_refused(llava, samples):
    (first, *_) = calibrate(llava, samples).traces
    assert Tis(layers="3").weights(first).shape == first.visual.shape
    with pytest.raises(SvlError, match=r"layers is 4, but the model has layers 0\.\.3"):
        Tis(layers="4").weights(first)


def test_tis_works_on_text_alone(llama, make_samples):
    """No image, so no cross-modal attention: the score is half the attention from text."""
    (first,) = calibrate(llama, make_samples([6], image=False)).traces
    T = len(first.visual)
    expected = (first.received[:, 1] / torch.arange(T, 0, -1) / 2).mean(0)
    torch.testing.assert_close(Tis().scores(first).float(), expected)
    for pool in ("joint", "modality"):
        assert Tis(pool=pool).weights(first).sum() == (T + 1) // 2


def test_tis_of_tokens_that_see_nothing_or_are_not_seen_is_finite():
    """A text in front of a picture at the end, attention ((1, 0), (0.3, 0.7)): neither has a cross-modal term."""
    sums = {"received": [[0.3, 0.7], [1, 0]], "emitted": [[0, 0.7], [1, 0.3]]}
    counts = {"queries": [[1, 1], [1, 0]], "keys": [[0, 1], [1, 1]]}
    measured = {name: torch.tensor([rows]) for name, rows in (sums | counts).items()}
    assert Tis().scores(TokenTrace(0, torch.tensor([False, True]), **measured)).tolist() == pytest.approx([0.5, 0.35])


def test_tis_takes_the_exact_fraction_and_of_equals_the_earlier():
    text = torch.zeros(25, dtype=torch.bool)
    assert Tis(p=0.28)._top(torch.ones(25), text).tolist() == [1] * 7 + [0] * 18  # 0.28 * 25 is 7.000000000000001
    noisy = torch.tensor([0.2, 0.2 + 1e-8, 0.2 - 1e-8, 0.2001], dtype=torch.float64)  # equal but for rounding errors
    assert Tis(p=0.5)._top(noisy, text[:4]).tolist() == [1, 0, 0, 1]
    assert Tis(p=0.5, rule="nucleus")._top(torch.zeros(4), text[:4]).tolist() == [1, 0, 0, 0]


# ----------------------------------------------------------------------------------------- compensation

SETTINGS = [
    {"rows": rows, "scope": scope, "anchor": anchor, "centered": centered}
    for rows, scope, anchor, centered in itertools.product(
        ("selected", "all", "means"), ("run", "layer"), ("before", "after"), (False, True)
    )
]
PLAN = Plan(4, (1, 2))


def hidden_states(lvlm, samples, encode) -> list[list[torch.Tensor]]:
    """h_0 .. h_L of every sample, each from a forward pass of its own: fp64 [T, d]."""
    states: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda _, args, out: states.extend([args[0], out])) for layer in lvlm.layers]
    result = []
    for sample in samples.items:
        with torch.inference_mode():
            lvlm.model(**encode(lvlm, [sample]))
        result.append([h[0].double() for h in [*states[::2], states[-1]]])
        states.clear()
    for handle in handles:
        handle.remove()
    return result


def scp_projector(states, weights, rows, scope, anchor, centered, rank, run) -> torch.Tensor:
    """V V^T of the stacked feature gaps of one removed run, by singular value decomposition: fp64 [d, d]."""
    start, stop = run
    kept = start - 1 if anchor == "before" else stop
    whole = stop - 1 if anchor == "before" else start
    H = []
    for h, w in zip(states, weights, strict=True):
        w = w if w.ndim == 1 else w[kept]
        chosen = torch.ones(len(h[0]), dtype=torch.bool) if rows == "all" else w > 0
        for removed in [whole] if scope == "run" else range(start, stop):
            gap = (h[removed + 1] - h[kept + 1])[chosen]  # X^l = h_{l+1} is what layer l gives
            H.append(gap.mean(0, keepdim=True) if rows == "means" else gap)
    stacked = torch.cat(H)
    stacked = stacked - stacked.mean(0) if centered else stacked
    _, singular, Vh = torch.linalg.svd(stacked, full_matrices=False)
    V = Vh[:rank].mT
    return V @ V.mT, singular


@pytest.fixture(scope="module")
def unpruned(llava, qwen, samples, encode):
    """Statistics and hidden states by model."""
    return {m.name: (calibrate(m, samples), hidden_states(m, samples, encode)) for m in (llava, qwen)}


@pytest.mark.parametrize("layers", ["mean", "each"])
@pytest.mark.parametrize("chosen", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_scp_equals_the_svd_of_the_stacked_gaps(chosen, layers, vlm, samples, unpruned):
    stats, states = unpruned[vlm.name]
    stats = select(stats, selector := Tis(p=0.4, layers=layers))
    patch = Subspace(rank=2, gain=0.7, **chosen).fit(Activations(vlm, samples, stats, batch_size=2), PLAN)
    expected, singular = scp_projector(
        states, [selector.weights(t) for t in stats.traces], rank=2, run=(1, 3), **chosen
    )
    ((key, update),) = patch.updates.items()
    assert key == ({"before": 0, "after": 3}[chosen["anchor"]], "mlp")
    operator = update.left.double() @ update.right.double()
    torch.testing.assert_close(operator, 0.7 * expected, atol=1e-4, rtol=0)
    seen = torch.tensor(patch.spectra[key[0]][: len(singular)]).double()
    torch.testing.assert_close(seen, singular.double()[: len(seen)], atol=1e-2, rtol=1e-3)
    spectrum = torch.linalg.eigvalsh(torch.eye(32) + operator)
    torch.testing.assert_close(spectrum, torch.tensor([1.0] * 30 + [1.7] * 2).double(), atol=1e-5, rtol=0)


def test_every_removed_run_has_its_own_directions(llava, samples, unpruned):
    stats, states = unpruned["llava"]
    stats = select(stats, Visual())
    plan = Plan(4, (1, 3))
    patch = Subspace(rank=3, targets=("mlp", "attn")).fit(Activations(llava, samples, stats), plan)
    assert sorted(patch.updates) == [(0, "attn"), (0, "mlp"), (2, "attn"), (2, "mlp")]
    weights = [Visual().weights(t) for t in stats.traces]
    for run in plan.runs:
        expected, _ = scp_projector(states, weights, **SETTINGS[0], rank=3, run=run)
        for target in ("mlp", "attn"):
            update = patch.updates[run[0] - 1, target]
            torch.testing.assert_close(update.left.double() @ update.right.double(), expected, atol=1e-4, rtol=0)


def test_fractional_weights_weigh_rows(llava, samples):
    class Half:
        needs = frozenset()

        def weights(self, trace):
            return 0.5 * torch.ones(len(trace.visual))

    stats = calibrate(llava, samples)
    half, full = (
        Subspace(centered=True).fit(Activations(llava, samples, select(stats, s)), PLAN).updates[0, "mlp"]
        for s in (Half(), All())
    )
    torch.testing.assert_close(half.left @ half.right, full.left @ full.right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compensation", [NoCompensation(), Subspace(rank=0)], ids=["none", "rank 0"])
def test_nothing_to_add_leaves_weights_bit_identical(compensation, lm, samples):
    stats = select(calibrate(lm, samples), All())
    patch = compensation.fit(Activations(lm, samples, stats), PLAN)
    assert not patch
    pruned, dense = apply(lm, PLAN, patch).model.state_dict(), lm.model.state_dict()
    path = lm.anatomy.layers
    assert all(t.data_ptr() == dense[n.replace(f"{path}.1.", f"{path}.3.")].data_ptr() for n, t in pruned.items())


@pytest.mark.parametrize("targets", [("mlp",), ("attn",), ("attn", "mlp")], ids=str)
@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_scp_scales_its_directions_in_the_named_targets_only(targets, gain, lm, samples):
    """(I + gain V V^T): gain 1 doubles what a projection (and its bias) writes along V, -1 removes it."""
    stats = select(calibrate(lm, samples), All())
    patch = Subspace(rank=3, gain=gain, targets=targets).fit(Activations(lm, samples, stats), PLAN)
    pruned = apply(lm, PLAN, patch)
    V = next(iter(patch.updates.values())).right.mT
    rest = torch.eye(32) - V @ V.mT
    for name, new in pruned.layers[0].named_parameters():
        old = lm.layers[0].get_parameter(name)
        if any(name.startswith(lm.anatomy.writers[t][0].module) for t in targets):
            torch.testing.assert_close(V.mT @ new, (1 + gain) * V.mT @ old, atol=1e-5, rtol=0)
            torch.testing.assert_close(rest @ new, rest @ old, atol=1e-5, rtol=0)
            assert not torch.equal(new, old)
        else:
            assert new.data_ptr() == old.data_ptr()


def test_runs_without_a_neighbour_are_noted_not_guessed(llava, samples):
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    patch = Subspace().fit(hidden, Plan(4, (0, 1, 3)))
    assert sorted(patch.updates) == [(2, "mlp")]
    assert patch.notes == ("layers 0..1 have no kept layer before them: not compensated",)
    patch = Subspace(anchor="after").fit(hidden, Plan(4, (0, 1, 3)))
    assert sorted(patch.updates) == [(2, "mlp")]
    assert patch.notes == ("layers 3..3 have no kept layer after them: not compensated",)
    assert not Subspace().fit(hidden, Plan(4, ()))


def test_directions_beyond_the_rank_of_the_gaps_are_not_invented(llava, samples):
    """Two samples have two mean rows: of four wanted directions, two exist."""
    two = replace(samples, items=samples.items[:2])
    hidden = Activations(llava, two, select(calibrate(llava, two), All()))
    patch = Subspace(rank=4, rows="means").fit(hidden, PLAN)
    assert patch.updates[0, "mlp"].right.shape == (2, 32)
    assert patch.notes == ("the gap beside layer 0 spans only 2 of the 4 directions asked for",)


def test_compensation_errors_are_plain(llava, llama, make_samples, samples):
    text = make_samples([3], image=False)
    empty = Activations(llama, text, select(calibrate(llama, text), Visual()))
    for rows in ("selected", "means"):
        with pytest.raises(SvlError, match="leaves no token for compensation"):
            Subspace(rows=rows).fit(empty, PLAN)
    assert Subspace(rows="all").fit(empty, PLAN)
    hidden = Activations(llava, samples, select(calibrate(llava, samples), All()))
    with pytest.raises(SvlError, match="rank is 33, but the model is only 32 wide"):
        Subspace(rank=33).fit(hidden, PLAN)
    partial = replace(llava, anatomy=replace(llava.anatomy, writers={"mlp": llava.anatomy.writers["mlp"]}))
    with pytest.raises(SvlError, match="targets for this model is 'attn'"):
        Subspace(targets=("attn",)).fit(replace(hidden, lvlm=partial), PLAN)
    for wrong in ({"rank": -1}, {"rows": "none"}, {"anchor": "both"}, {"scope": "all"}, {"targets": ("qkv",)}):
        with pytest.raises(SvlError, match=f"compensation.{next(iter(wrong))}"):
            Subspace(**wrong)


def test_hidden_states_that_overflow_are_named(llava, samples):
    stats = select(calibrate(llava, samples), All())
    handle = llava.layers[2].register_forward_hook(lambda _, __, out: out * float("inf"))
    with pytest.raises(SvlError, match=r"not finite.*model\.dtype"):
        Subspace().fit(Activations(llava, samples, stats), PLAN)
    handle.remove()


# ----------------------------------------------------------------------------------- every combination


def method(file: Path):
    """What a configuration file describes, with seed 0."""
    group = file.parent.name
    node = OmegaConf.load(file)
    node.pop("defaults", None)
    node.update(OPTIONS.get(file.stem, {}))
    return build(OmegaConf.create({"seed": 0, "strategy": {}, group: node})[group], group)


@pytest.fixture(scope="module")
def measured(llava, qwen, make_samples):
    data = make_samples([3, 9, 1])
    return {lvlm.name: (data, calibrate(lvlm, data)) for lvlm in (llava, qwen)}


def test_the_matrix_is_complete():
    for pair in itertools.combinations(range(3), 2):
        groups = [FILES[GROUPS[i]] for i in pair]
        assert {tuple(c[i] for i in pair) for c in COMBINATIONS} == set(itertools.product(*groups))
    assert len(FILES["strategy"]) >= 18
    assert len(FILES["compensation"]) >= 7
    assert all(len(list(Path(CONF, group).iterdir())) == len(files) for group, files in FILES.items())


@pytest.mark.parametrize("files", COMBINATIONS, ids=lambda files: "-".join(f.stem for f in files))
def test_every_combination_prunes_and_answers(files, vlm, measured, encode, generate):
    strategy, selector, compensation = map(method, files)
    data, stats = measured[vlm.name]
    seen = replace(select(stats, selector), probe=ModelProbe(vlm, data))
    plan = strategy.plan(seen, 2)
    n = 0 if isinstance(strategy, Identity) else 2
    assert len(plan.removed) == n
    assert Plan.from_json(plan.to_json()) == plan
    patch = compensation.fit(Activations(vlm, data, seen), plan)
    assert all(layer in plan.kept and role in vlm.anatomy.writers for layer, role in patch.updates)
    assert all(layer in plan.kept for layer in patch.blends)
    pruned = apply(vlm, plan, patch)
    out = generate(pruned.model, encode(vlm, data.items[:1]), n=2)
    assert len(pruned.layers) == len(out.past_key_values.layers) == 4 - n
    assert all(logits.isfinite().all() for logits in out.logits)


def as_published(strategy: Path):
    """A strategy with the selector and the compensation that its file brings, or else all tokens and none."""
    brought = {"selector": "all", "compensation": "none"}
    for line in OmegaConf.load(strategy).get("defaults", []):
        ((key, choice),) = line.items()
        brought[key.rpartition(".")[2]] = choice
    return strategy, *(Path(CONF, group, f"{brought[group]}.yaml") for group in ("selector", "compensation"))


PUBLISHED = [*map(as_published, FILES["strategy"])]
OTHERS = [
    (Path(CONF, "strategy", "shortgpt.yaml"), Path(CONF, "selector", "all.yaml"), c) for c in FILES["compensation"]
]


@pytest.fixture(scope="module")
def demo():
    return svl.load(PACKAGE / "demo" / "demo_lvlm", device="cpu")


@pytest.fixture(scope="module")
def elsewhere(llama, internvl, demo, make_samples):
    """Models with their samples and statistics: a text model, InternVL, and the LVLM that is bundled."""
    bundled = svl.read_samples(PACKAGE / "demo" / "data" / "calibration.parquet", n=4)
    data = {"llama": make_samples([13] * 6, image=False), "internvl": make_samples([3, 9, 5, 7]), "demo": bundled}
    models = {"llama": llama, "internvl": internvl, "demo": demo}
    return {name: (m, data[name], calibrate(m, data[name])) for name, m in models.items()}


@pytest.mark.parametrize("model", ["llama", "internvl", "demo"])
@pytest.mark.parametrize("files", dict.fromkeys(PUBLISHED + OTHERS), ids=lambda f: "-".join(p.stem for p in f))
def test_every_method_runs_on_every_kind_of_model(files, model, elsewhere, encode, generate):
    strategy, selector, compensation = map(method, files)
    lvlm, data, stats = elsewhere[model]
    seen = replace(select(stats, selector), probe=ModelProbe(lvlm, data))
    plan = strategy.plan(seen, 2)
    assert len(plan.removed) == (0 if isinstance(strategy, Identity) else 2)
    patch = compensation.fit(Activations(lvlm, data, seen), plan)
    pruned = apply(lvlm, plan, patch)
    assert bool(patch) == (compensation.needs != frozenset() or files[2].stem == "merge")
    out = generate(pruned.model, encode(lvlm, data.items[:2]), n=2)
    assert all(logits.isfinite().all() for logits in out.logits)


def test_one_pass_serves_strategies_selectors_and_ratios(tmp_path, monkeypatch):
    """A whole sweep calibrates once: in two batches, whose forward passes are counted."""
    passes = []

    def counted(*args):
        passes.append(len(args[1]))
        return measure(*args)

    monkeypatch.setattr(svl.calibrate, "measure", counted)
    config.register()
    plans = set()
    grid = itertools.product(
        ("shortgpt", "angular", "streamline", "interlace", "spaced"), ("tis", "all"), (0.125, 0.25)
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for strategy, selector, ratio in grid:
            words = [f"strategy={strategy}", f"selector={selector}", "compensation=none", f"ratio={ratio}"]
            words += ["benchmark=none", "tracker=none", "calibration.samples=6", "calibration.batch_size=4"]
            words += [f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", "model.device=cpu"]
            run = pipeline.Run(compose("config", overrides=words), tmp_path)
            plans.add(tuple(run.plan(run.calibrate()).output["removed"]))
    assert passes == [4, 2]
    assert len(list((tmp_path / "stats").iterdir())) == 1
    assert len(plans) > 4


def test_a_compensation_that_is_refused_costs_no_calibration(tmp_path, monkeypatch):
    def refuse(lvlm):
        raise SvlError("normalises after its projections")

    monkeypatch.setattr(surgery, "check_foldable", refuse)
    monkeypatch.setattr(svl.calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))
    config.register()
    words = ["strategy=shortgpt", "compensation=subspace", "benchmark=none", "tracker=none", "model.device=cpu"]
    words += [f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", "calibration.samples=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = pipeline.Run(compose("config", overrides=words), tmp_path)
    with pytest.raises(SvlError, match="normalises after"):
        run.calibrate()
