"""One layer after another: the loop against loops written out, its cost, its memory."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from helpers.references import close, logits
from helpers.streams import record
from torch import nn
from torch.nn import functional as F

from svl.calibration import calibrate
from svl.calibration.activations import Activations
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.rescoring import ModelRescoring
from svl.calibration.row_count import counted_rows
from svl.compensation.ghosted import Ghosted
from svl.compensation.linear import Linear
from svl.compensation.magnitude import Magnitude
from svl.compensation.none import NoCompensation
from svl.compensation.refit import Refit
from svl.core import Plan, Stats, Strategy, SvlError
from svl.models.layer_calls import first_output
from svl.pruning import surgery
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.tis import Tis
from svl.strategies.angular import Angular
from svl.strategies.block_pruner import BlockPruner
from svl.strategies.cosine import Cosine
from svl.strategies.depth_shapley import DepthShapley
from svl.strategies.identity import Identity
from svl.strategies.interlace import Interlace
from svl.strategies.iterative import Iterative
from svl.strategies.laco import Laco
from svl.strategies.layer_pairs import LayerPairs
from svl.strategies.lorp import Lorp
from svl.strategies.manual import Manual
from svl.strategies.random import Random as RandomLayers
from svl.strategies.runs import Runs
from svl.strategies.shortened_magnitude import ShortenedMagnitude
from svl.strategies.shortened_ppl import ShortenedPpl
from svl.strategies.shortened_taylor import ShortenedTaylor
from svl.strategies.sleb import Sleb
from svl.strategies.spaced import Spaced
from svl.strategies.streamline import Streamline
from svl.strategies.sublayer_cosine import SublayerCosine
from svl.strategies.swm import Swm


def rescoring(lvlm, samples, compensation, selector=None, **options) -> Stats:
    """The statistics that a strategy is given in a run."""
    measured = calibrate.select(calibrate.calibrate(lvlm, samples, batch_size=2), selector or All())
    stats = replace(measured, probe=ModelProbe(lvlm, samples))
    return replace(stats, rescoring=ModelRescoring(Activations(lvlm, samples, stats, 2), compensation, **options))


class Scripted:
    """A rescoring whose answers depend on what is gone."""

    def next_removal(self, strategy, removed):
        left = [i for i in range(6) if i not in removed]
        scores = {i: random.Random(f"{i} {sorted(removed)}").random() for i in left}
        return min(scores, key=scores.get), scores, 10


@pytest.mark.parametrize("n", range(6))
def test_importance_is_that_of_a_layers_last_measurement(n):
    plan = Iterative().plan(Stats(6, tuple(range(6)), rescoring=Scripted()), n)
    gone, scores = [], {}
    for _ in range(n):
        layer, found, _ = Scripted().next_removal(None, gone)
        scores |= found
        gone.append(layer)
    assert plan.order == tuple(gone)
    assert plan.removed == tuple(sorted(gone))
    assert plan.importance == tuple(scores[i] for i in sorted(scores))
    assert plan.provenance == {"passes": 10 * n}


# ----------------------------------------------------------------------------------- loops written out


def cosines(lvlm, samples, encode) -> list[float]:
    """Mean cosine of what enters and what leaves each layer over all tokens, from forward passes one by one."""
    found = [[] for _ in lvlm.layers]

    def keep(i):
        return lambda _, args, out: found[i].append(F.cosine_similarity(args[0][0].double(), out[0].double(), dim=-1))

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(lvlm.layers)]
    for sample in samples:
        logits(lvlm.model, encode(lvlm, [sample]))
    for handle in handles:
        handle.remove()
    return [float(torch.cat(parts).mean()) for parts in found]


@pytest.mark.parametrize("removed", [2, 3])
def test_prune_and_comp_as_its_paper_has_it(removed, lm, samples, encode):
    """One model, cut as it stands: the most similar layer goes, what was written before it is multiplied by alpha."""
    model = copy.deepcopy(lm.model)
    model.config.get_text_config().use_cache = False  # layers keep their numbers
    now, numbers, entering, gone = replace(lm, model=model), [0, 1, 2, 3], [1.0], []

    def enlarge(_, args, kwargs):
        if args:
            return (args[0] * entering[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * entering[0]}

    with torch.no_grad():
        for _ in range(removed):
            handle = now.layers[0].register_forward_pre_hook(enlarge, with_kwargs=True)
            found = cosines(now, samples, encode)
            at = max(range(len(found)), key=found.__getitem__)
            seen = record(now, samples, encode)
            handle.remove()
            ratios = [s.states[at + 1].abs().mean(0) / s.states[at].abs().mean(0) for s in seen]
            alpha = float(torch.stack(ratios).mean(0).mean())
            entering[0] *= alpha
            for layer in now.layers[:at]:
                for name, parameter in layer.named_parameters():
                    if "o_proj" in name or "down_proj" in name:
                        parameter.mul_(alpha)
            gone.append(numbers.pop(at))
            kept = nn.ModuleList(layer for i, layer in enumerate(now.layers) if i != at)
            owner, _, name = lm.anatomy.layers.rpartition(".")
            setattr(model.get_submodule(owner), name, kept)
            model.config.get_text_config().num_hidden_layers = len(kept)
            now = replace(now, anatomy=replace(now.anatomy, n_layers=len(kept), writers={}))

    plan = Iterative(Cosine()).plan(rescoring(lm, samples, Magnitude()), removed)
    assert plan.order == tuple(gone)
    patch = Magnitude().fit(Activations(lm, samples, rescoring(lm, samples, Magnitude()), 2), plan)
    inputs = encode(lm, samples)
    now.layers[0].register_forward_pre_hook(enlarge, with_kwargs=True)
    close(logits(apply(lm, plan, patch).model, inputs), logits(model, inputs), 1e-4)


@pytest.mark.parametrize("compensation", [Linear(), Ghosted(), NoCompensation()], ids=lambda c: type(c).__name__)
def test_the_next_layer_is_chosen_on_the_compensated_model(compensation, lm, samples, encode):
    stats = rescoring(lm, samples, compensation)
    plan = Iterative(Cosine()).plan(stats, 3)
    hidden, gone = Activations(lm, samples, stats, 2), []
    for _ in range(3):
        before = Plan(4, tuple(gone))
        model = apply(lm, before, compensation.fit(hidden, before)) if gone else lm
        found = cosines(model, samples, encode)
        gone.append(before.kept[max(range(len(found)), key=found.__getitem__)])
    assert plan.order == tuple(gone)


def test_tokens_are_weighed_again(vlm, samples):
    """TIS on the pruned model, by its own attention."""
    stats = rescoring(vlm, samples, NoCompensation(), Tis())
    plan = Iterative(Cosine()).plan(stats, 2)
    first = Cosine().plan(stats, 1).removed[0]
    pruned = apply(vlm, Plan(4, (first,)))
    again = calibrate.select(calibrate.calibrate(pruned, samples, batch_size=2), Tis())
    left = [i for i in range(4) if i != first]
    assert plan.order == (first, left[Cosine().plan(again, 1).removed[0]])


def test_sleb_without_compensation_is_sleb(lm, samples):
    stats = rescoring(lm, samples, NoCompensation())
    plan = Iterative(Sleb(samples=None)).plan(stats, 2)
    expected = Sleb(samples=None).plan(stats, 2)
    assert plan.removed == expected.removed
    for i in range(1, 3):  # where both measure: the last layers that can go
        assert plan.importance[i] == pytest.approx(expected.importance[i], abs=1e-4)


def test_scores_of_weights_see_what_compensation_made_of_them(llama, samples):
    stats = rescoring(llama, samples, Magnitude())
    score = ShortenedMagnitude(protected=(0,))
    plan = Iterative(score).plan(stats, 2)
    first = plan.order[0]
    patch = Magnitude().fit(Activations(llama, samples, stats, 2), Plan(4, (first,), order=(first,)))
    sizes = ModelProbe(apply(llama, Plan(4, (first,)), patch), None).magnitude(1)
    left = [i for i in range(4) if i != first]
    assert [plan.importance[i] for i in left] == pytest.approx(sizes, rel=1e-6)


def test_maps_are_no_weights_of_a_layer(llama, samples):
    stats = rescoring(llama, samples, Ghosted())
    plan = Iterative(ShortenedMagnitude(protected=(0,))).plan(stats, 2)
    assert list(plan.importance) == pytest.approx(stats.probe.magnitude(1), rel=1e-6)


# ------------------------------------------------------------------------------------ numbers of layers


@pytest.mark.parametrize("strategy", [ShortenedMagnitude, ShortenedPpl, ShortenedTaylor])
@pytest.mark.parametrize("spared", [0, 1, 2, 3, -1, -2])
def test_protected_layers_stay_whatever_has_gone(strategy, spared, llama, samples):
    """Three of four layers go: all but the one that the setting names."""
    plan = Iterative(strategy(protected=(spared,))).plan(rescoring(llama, samples, NoCompensation()), 3)
    assert plan.kept == (spared % 4,)


def test_a_selector_reads_the_layer_that_it_names(vlm, samples):
    """Layer 2 by its own attention, though it is the second one that is left; never another one in its place."""
    again = rescoring(vlm, samples, NoCompensation(), Tis(layers="2", p=0.3)).rescoring
    layer, importance, _ = again.next_removal(Cosine(), (0,))
    measured = calibrate.calibrate(apply(vlm, Plan(4, (0,))), samples, batch_size=2)
    wanted, others = (Cosine().plan(calibrate.select(measured, Tis(layers=n, p=0.3)), 1) for n in "12")
    assert importance == dict(zip((1, 2, 3), wanted.importance, strict=True))
    assert layer == wanted.removed[0] + 1
    assert wanted.importance != others.importance
    with pytest.raises(
        SvlError, match=r"selector\.layers is 2, but layer 2 has gone: name another one, or keep it with "
    ):
        again.next_removal(Cosine(), (0, 2))
    with pytest.raises(SvlError, match=r"selector\.layers is 4, but the model has layers 0\.\.3"):
        Tis(layers="4").weights(replace(next(iter(measured.traces)), gone=(0,)))


@pytest.mark.parametrize("seed", range(4))
def test_random_layers_one_by_one_are_those_of_one_draw(seed, llama, samples):
    stats = rescoring(llama, samples, Magnitude())
    plan = Iterative(RandomLayers(seed)).plan(stats, 3)
    assert [set(plan.order[:n]) for n in (1, 2, 3)] == [
        set(RandomLayers(seed).plan(stats, n).removed) for n in (1, 2, 3)
    ]


# --------------------------------------------------------------------------------------- cost and memory


SEARCHES = (
    Cosine(),
    LayerPairs(),
    Sleb(samples=None),
    Sleb(samples=3),
    ShortenedPpl(protected=(0,)),
    DepthShapley("logits"),
    ShortenedTaylor(protected=(0,)),
    ShortenedMagnitude(protected=(0,)),
)


@pytest.mark.parametrize(
    "compensation", [NoCompensation(), Magnitude(), Linear(), Refit()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("strategy", SEARCHES, ids=str)
def test_the_passes_told_are_those_run(strategy, compensation, llama, samples, monkeypatch):
    """Rows that leave decoder layers, as hooks on every model see them, the dense one and all that are made of it."""
    stats, rows = rescoring(llama, samples, compensation), []

    def watched(lvlm):
        for layer in lvlm.layers:
            handles.append(layer.register_forward_hook(lambda _, args, out: rows.append(len(first_output(out)))))
        return lvlm

    handles, build = [], surgery.apply
    monkeypatch.setattr(surgery, "apply", lambda *args: watched(build(*args)))
    watched(llama)
    order, told = [], 0.0
    for _ in range(2 if isinstance(strategy, Sleb) else 3):  # its first and last layer always stay
        layer, _, passes = stats.rescoring.next_removal(strategy, order)
        order, told = [*order, layer], told + passes
    for handle in handles:
        handle.remove()
    assert told == pytest.approx(sum(rows) / (4 * len(samples)), rel=1e-9)
    assert (told > 0) == bool(strategy.needs & {"cosine", "windows", "probe"} | compensation.needs)


def test_what_is_remembered_costs_what_it_cost(llama, samples):
    """Whether the first trials were stored by another search does not change what is told."""
    kept = {}

    def remember(what, inputs, compute):
        key = (what, str(inputs))
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    told = []
    for _ in range(2):
        stats = rescoring(llama, samples, NoCompensation())
        probe = ModelProbe(llama, samples, remember=remember)
        again = ModelRescoring(Activations(llama, samples, replace(stats, probe=probe), 2), NoCompensation())
        told.append(Iterative(Sleb(samples=3)).plan(replace(stats, rescoring=again), 2).provenance["passes"])
    assert told[0] == told[1] > 0
    assert len(kept) == 1


def test_a_longer_search_continues_a_shorter_one(llama, samples):
    kept, computed = {}, []

    def remember(what, inputs, compute):
        key = (what, str(inputs))
        if key not in kept:
            computed.append(inputs["removed"])
            kept[key] = compute()
        return kept[key]

    short = Iterative(Cosine()).plan(rescoring(llama, samples, Magnitude(), remember=remember), 2)
    long = Iterative(Cosine()).plan(rescoring(llama, samples, Magnitude(), remember=remember), 3)
    assert computed == [(), short.order[:1], short.order]
    assert long.order[:2] == short.order
    assert long == Iterative(Cosine()).plan(rescoring(llama, samples, Magnitude()), 3)


# ---------------------------------------------------------------------------------------------- refusals


ONE_BY_ONE = "which cannot be asked for one layer after another"


@pytest.mark.parametrize(
    "strategy",
    [
        *(
            Angular(),
            BlockPruner(),
            Identity(),
            Interlace(),
            Iterative(),
            Laco(),
            Lorp(),
            Manual((1,)),
            Runs(),
            Spaced(),
        ),
        *(Streamline(), SublayerCosine(), Swm()),
    ],
    ids=lambda s: type(s).__name__,
)
def test_what_chooses_layers_together_is_refused(strategy):
    with pytest.raises(SvlError, match=rf"strategy\.of is {type(strategy).__name__}, {ONE_BY_ONE}"):
        Iterative(strategy)


@dataclass(frozen=True)
class Untrue(Strategy):
    """Says that it can be asked for one layer, and gives something else."""

    answer: Plan
    stepwise: ClassVar[bool] = True

    def plan(self, stats, n_remove):
        return self.answer


@pytest.mark.parametrize(
    "answer", [Plan(4, (1, 2)), Plan(4, ()), Plan(4, (1,), removed_attn=(2,)), Plan(4, (1,), merges=((0, (1,)),))]
)
def test_answers_that_are_no_layer_are_refused(answer, llama, samples):
    with pytest.raises(SvlError, match="Untrue cannot be asked for one layer after another"):
        Iterative(Untrue(answer)).plan(rescoring(llama, samples, NoCompensation()), 1)


def test_what_cannot_go_layer_by_layer_is_refused(llama, samples):
    stats = rescoring(llama, samples, Ghosted())
    refusal = r"cannot be tried out on a model with maps at its cuts.* folds into weights"
    with counted_rows() as count, pytest.raises(SvlError, match=refusal):
        Iterative(Sleb()).plan(stats, 2)
    assert count.rows == 0  # known before the first trial
    with pytest.raises(SvlError, match="it needs 'rescoring'"):
        Iterative(Cosine()).plan(Stats(4, (0, 1, 2, 3)), 1)
    with pytest.raises(SvlError, match="cannot remove 4 of 4 decoder layers"):
        Iterative().plan(Stats(4, (0, 1, 2, 3), rescoring=Scripted()), 4)
