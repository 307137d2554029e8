"""One layer after another: the loop against loops written out, its cost, its memory."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers.references import close, logits
from helpers.streams import record
from torch import nn
from torch.nn import functional as F

from svl.calibration import activations, calibrate
from svl.calibration.activations import Activations
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.rescoring import ModelRescoring
from svl.compensation.ghosted import Ghosted
from svl.compensation.linear import Linear
from svl.compensation.magnitude import Magnitude
from svl.compensation.none import NoCompensation
from svl.core import Plan, Stats, SvlError
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.tis import Tis
from svl.strategies.cosine import Cosine
from svl.strategies.interlace import Interlace
from svl.strategies.iterative import Iterative
from svl.strategies.laco import Laco
from svl.strategies.shortened_magnitude import ShortenedMagnitude
from svl.strategies.sleb import Sleb


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


# --------------------------------------------------------------------------------------- cost and memory


def test_passes_are_counted(llama, samples, monkeypatch):
    """Forward passes of batches, as hooks see them: three batches of two samples make a pass."""
    stats, calls = rescoring(llama, samples, Magnitude()), []
    for module in (calibrate, activations):
        run = module.run_decoder
        monkeypatch.setattr(module, "run_decoder", lambda *args, run=run: (calls.append(1), run(*args)))
    plan = Iterative(Cosine()).plan(stats, 3)
    behind = sum(layer != max({*range(4)} - {*plan.order[:i]}) for i, layer in enumerate(plan.order[:2]))
    assert plan.provenance["passes"] == 2 + behind  # no factor, and no pass, where nothing is behind a layer
    assert len(calls) == 3 * plan.provenance["passes"]


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


def test_what_cannot_go_layer_by_layer_is_refused(llama, samples):
    with pytest.raises(SvlError, match=r"strategy\.of goes layer after layer itself"):
        Iterative(Iterative())
    with pytest.raises(SvlError, match="Laco cannot be asked for one layer after another"):
        Iterative(Laco(size=2)).plan(rescoring(llama, samples, NoCompensation()), 1)
    with pytest.raises(SvlError, match="cannot be tried out on a model with maps at its cuts"):
        Iterative(Sleb()).plan(rescoring(llama, samples, Ghosted()), 2)
    with pytest.raises(SvlError, match="it needs 'rescoring'"):
        Iterative(Interlace()).plan(Stats(4, (0, 1, 2, 3)), 1)
    with pytest.raises(SvlError, match="cannot remove 4 of 4 decoder layers"):
        Iterative().plan(Stats(4, (0, 1, 2, 3), rescoring=Scripted()), 4)
