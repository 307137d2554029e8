"""Published layer-pruning methods against their formulas, brute force, and numbers that their authors give."""

from __future__ import annotations

import copy
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from svl.calibrate import Activations, _windows, calibrate, encode_answer, select
from svl.compensation.linear import Linear
from svl.compensation.linear_cosine import LinearCosine
from svl.compensation.mean_update import MeanUpdate
from svl.compensation.merge import Merge
from svl.compensation.refit import Refit
from svl.core import Patch, Plan, Stats, SvlError, TokenTrace, Update, blends
from svl.data import Example, Examples
from svl.probe import ModelProbe
from svl.regression import Regression
from svl.replay import record
from svl.selectors.simple import All, Last
from svl.strategies.angular import Angular
from svl.strategies.cosine import Cosine
from svl.strategies.depth_shapley import DepthShapley
from svl.strategies.interlace import Interlace
from svl.strategies.laco import Laco
from svl.strategies.runs import Runs
from svl.strategies.shortened_magnitude import ShortenedMagnitude
from svl.strategies.shortened_ppl import ShortenedPpl
from svl.strategies.shortened_taylor import ShortenedTaylor
from svl.strategies.sleb import Sleb
from svl.strategies.spaced import Spaced
from svl.strategies.streamline import Streamline
from svl.surgery import apply

# BI of LLaMA-2-7B on OpenWebText, published with arXiv 2407.16286.
BI = (
    ".4066 .2499 .1454 .1462 .1515 .1501 .1436 .1420 .1339 .1287 .1248 .1131 .1092 .1100 .1058 .1059 "
    ".1062 .0839 .0756 .0637 .0616 .0466 .0440 .0365 .0347 .0308 .0332 .0299 .0332 .0337 .0603 .3072"
)  # fmt: skip


def states(layers: int, tokens: int, seed: int = 0, width: int = 8) -> torch.Tensor:
    """A random residual stream [L + 1, T, d] in small steps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers + 1, tokens, width, generator=generator).cumsum(0)


def windowed(h: torch.Tensor, selector=None) -> Stats:
    """What calibration measures on a stream: cosines of neighbours and of all pairs."""
    pairs = _windows(list(h[:, None]))[0]
    trace = TokenTrace(0, torch.zeros(h.shape[1], dtype=torch.bool), F.cosine_similarity(h[:-1], h[1:], dim=-1), pairs)
    return Stats(len(h) - 1, tuple(range(len(h) - 1)), (trace,), selector or All())


# ------------------------------------------------------------------------------- scores of activations


def test_shortgpt_removes_the_layers_it_publishes():
    importance = [float(x) for x in BI.split()]
    assert Stats(32, tuple(range(32))).plan(importance, 9).removed == tuple(range(21, 30))


@pytest.mark.parametrize("n", [0, 1, 2, 4, 6, 8])
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_best_of_all_sets(n, seed):
    h, depth, spared = states(9, 7, seed).double(), 9, {0, 7} if seed % 2 else set()
    stats = windowed(h).without(spared)

    def cost(removed: tuple[int, ...]) -> float:
        kept = [-1, *(i for i in range(depth) if i not in removed), depth]
        gaps = [(a + 1, b) for a, b in itertools.pairwise(kept) if b - a > 1]
        return sum(1 - float(F.cosine_similarity(h[a], h[b], dim=-1).mean()) for a, b in gaps)

    if n > depth - len(spared):
        with pytest.raises(SvlError, match="at most 7 may go"):
            Runs().plan(stats, n)
        return
    choices = [c for c in itertools.combinations(range(depth), n) if not spared & set(c)]
    assert Runs().plan(stats, n).removed == min(choices, key=cost)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_windows_are_found_as_by_brute_force(n, seed):
    h, depth = states(9, 7, seed).double(), 9
    angle = {
        s: sum(math.acos(F.cosine_similarity(h[s, t], h[s + n, t], dim=0)) for t in range(7))
        for s in range(depth - n + 1)
    }
    similarity = {s: F.cosine_similarity(h[s], h[s + n], dim=-1).mean() for s in range(depth - n + 1)}
    last = {s: math.acos(F.cosine_similarity(h[s, -1], h[s + n, -1], dim=0)) for s in range(1, depth - n + 1)}

    def block(start):
        return tuple(range(start, start + n))

    assert Angular(first=0).plan(windowed(h), n).removed == block(min(angle, key=angle.get))
    assert Angular().plan(windowed(h, Last()), n).removed == block(min(last, key=last.get))
    assert Streamline().plan(windowed(h), n).removed == block(max(similarity, key=similarity.get))


def test_windows_of_a_model_are_those_of_its_states(lm, samples):
    stats = select(calibrate(lm, samples, statistics=("windows",), batch_size=3), All())
    total, tokens = torch.zeros(5, 5, dtype=torch.float64), 0
    for sample in Activations(lm, samples, stats).stream(range(5)):
        h = torch.stack([sample.h(i) for i in range(5)]).double()
        total += F.cosine_similarity(h[:, None], h[None], dim=-1).sum(-1)
        tokens += h.shape[1]
    measured = stats.windows()
    assert measured.isnan().sum() == 15
    torch.testing.assert_close(measured.nan_to_num(), (total / tokens).triu(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.diagonal(1), select(calibrate(lm, samples), All()).cosine(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_massive_activations_neither_overflow_nor_vanish(dtype):
    """In fp16, dot products of such states are inf / inf, which some codes turn into a similarity of 0.5."""
    h = states(4, 6, width=64)
    h[:, 0, 3] = torch.tensor([6e4, 6e4, 5.9e4, 6e4, 5e4])
    h[:, 2] *= 1e-3
    h = h.to(dtype)
    exact = F.cosine_similarity(h[:, None].double(), h[None].double(), dim=-1)
    found = _windows(list(h[:, None]))[0]
    i, j = torch.triu_indices(5, 5, 1)
    torch.testing.assert_close(found.double(), exact[i, j], atol=1e-5, rtol=0)


def test_windows_avoid_protected_layers():
    stats = replace(windowed(states(6, 5)), removable=(0, 1, 3, 4, 5))
    assert set(Streamline().plan(stats, 3).removed) == {3, 4, 5}
    with pytest.raises(SvlError, match="no 4 layers in a row"):
        Streamline().plan(stats, 4)


@pytest.mark.parametrize("seed", range(4))
def test_spaced_layers_are_the_cheapest_that_keep_their_distance(seed):
    stats = windowed(states(9, 5, seed))
    importance = (1 - stats.cosine()).tolist()
    for gap, n in itertools.product(range(3), range(1, 4)):
        sets = [s for s in itertools.combinations(range(9), n) if all(b - a > gap for a, b in itertools.pairwise(s))]
        assert Spaced(gap).plan(stats, n).removed == min(sets, key=lambda s: sum(importance[i] for i in s))
    assert Spaced(0).plan(stats, 4).removed == Cosine().plan(stats, 4).removed
    assert len(Spaced(3).plan(stats, 6).removed) == 6  # does not fit, so the gap shrinks


@pytest.mark.parametrize("seed", range(4))
def test_interlace_takes_one_layer_of_every_triplet(seed):
    h = states(12, 5, seed)
    stats, cosine = windowed(h), windowed(h).windows()
    first = max(range(9), key=lambda i: cosine[i, i + 3])
    single = Interlace().plan(stats, 1).removed
    assert single == (max((first, first + 1), key=lambda i: cosine[i, i + 1]),)
    for n in range(1, 4):
        removed = Interlace().plan(stats, n).removed
        assert all(b - a > 1 for a, b in itertools.pairwise(removed))
    assert len(Interlace().plan(stats, 9).removed) == 9
    removed, taken = [], set()
    for i in sorted(range(9), key=lambda i: -float(F.cosine_similarity(h[i], h[i + 3], dim=-1).mean())):
        if not taken & {i, i + 1, i + 2}:
            taken |= {i, i + 1, i + 2}
            removed.append(max((i, i + 1), key=lambda j: float(F.cosine_similarity(h[j], h[j + 1], dim=-1).mean())))
    for n in range(len(removed) + 1):
        assert Interlace().plan(stats, n).removed == tuple(sorted(removed[:n]))


# ----------------------------------------------------------------------------------- losses of removals


@pytest.fixture
def plain(make_samples):
    """The same samples as running text."""
    return Examples("plain", tuple(replace(e, plain=True, image_bytes=None) for e in make_samples([5, 9, 12]).items))


def naive(lvlm, examples, removed, labels=None):
    """Loss of the rebuilt model, through its own forward pass; one sample at a time."""
    model, total, n = apply(lvlm, Plan(lvlm.anatomy.n_layers, tuple(removed))).model, 0.0, 0
    for example in examples.items:
        inputs, answer = encode_answer(lvlm, example)
        with torch.inference_mode():
            logits = model(**inputs).logits[0].float()
        where = [i for i in range(1, len(answer)) if answer[i]]
        picked = F.cross_entropy(logits[[i - 1 for i in where]], inputs["input_ids"][0][where], reduction="sum")
        total, n = total + float(picked), n + len(where)
    return total / n


@pytest.mark.parametrize("memory", [0, 2**31])
def test_losses_are_those_of_rebuilt_models(lm, samples, memory):
    probe = ModelProbe(lm, samples, memory=memory)
    for removed in ((), (1,), (1, 3), (0, 3), (2,)):  # deeper, and back again
        rest = [i for i in range(4) if i not in removed]
        base, losses = probe.losses(removed, rest[:-1])
        assert base == pytest.approx(naive(lm, samples, removed), abs=1e-5)
        assert losses == pytest.approx({i: naive(lm, samples, (*removed, i)) for i in rest[:-1]}, abs=1e-5)


def test_losses_of_text_count_every_next_token(llama, plain):
    base, losses = ModelProbe(llama, plain).losses((), (1, 2))
    total, n = 0.0, 0
    for example in plain.items:
        inputs = llama.encode([example.prompt])
        with torch.inference_mode():
            loss = llama.model(**inputs, labels=inputs["input_ids"]).loss
        size = inputs["input_ids"].shape[1] - 1
        total, n = total + float(loss) * size, n + size
    assert base == pytest.approx(total / n, abs=1e-5)
    assert losses.keys() == {1, 2}


def test_only_the_answer_is_scored(vlm, samples):
    for example in samples.items:
        inputs, answer = encode_answer(vlm, example)
        text = vlm.tokenizer.decode(inputs["input_ids"][0][answer], skip_special_tokens=True)
        assert text.split() == [example.answer]
        assert not (answer & (inputs["input_ids"][0] == vlm.anatomy.image_token_id)).any()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 99))
def test_other_samples_and_their_padding_never_matter(llama, make_samples, lengths, batch_size, seed):
    data = make_samples(lengths, image=False, seed=seed)
    alone = [calibrate(llama, Examples("one", (e,))).traces[0] for e in data.items]
    for one, trace in zip(alone, calibrate(llama, data, batch_size=batch_size).traces, strict=True):
        torch.testing.assert_close(one.windows, trace.windows, atol=1e-5, rtol=0)
    base, _ = ModelProbe(llama, data).losses((), ())
    parts = [(ModelProbe(llama, Examples("one", (e,))).losses((), ())[0], e) for e in data.items]
    counts = [int(encode_answer(llama, e)[1].sum()) for _, e in parts]
    assert base == pytest.approx(sum(x * n for (x, _), n in zip(parts, counts, strict=True)) / sum(counts), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_padding_pictures_and_prompts_are_never_scored(vlm, make_samples, seed):
    """The model's own loss over one batch, padded by chance, whose labels are the answers and nothing else."""
    chance = random.Random(seed)
    lengths, extra = [chance.randint(1, 14) for _ in range(chance.randint(2, 4))], chance.randint(0, 5)
    data = make_samples(lengths, seed=seed)
    inputs, answers = zip(*(encode_answer(vlm, e) for e in data.items), strict=True)
    width = extra + max(a.shape[0] for a in answers)
    batch = vlm.encode(
        [vlm.prompt(e.prompt, True, e.answer).rstrip("\n") for e in data.items], [e.image for e in data.items]
    )
    labels = torch.full((len(lengths), width), -100)
    tokens, mask = torch.zeros_like(labels), torch.zeros_like(labels)
    for row, (one, answer) in enumerate(zip(inputs, answers, strict=True)):
        n = len(answer)
        tokens[row, width - n :], mask[row, width - n :] = one["input_ids"][0], 1
        labels[row, width - n :][answer] = one["input_ids"][0][answer]
    kinds = {"mm_token_type_ids": (tokens == vlm.anatomy.image_token_id).long()} if "mm_token_type_ids" in batch else {}
    batch = {name: x for name, x in batch.items() if x.shape != batch["input_ids"].shape}
    batch |= {"input_ids": tokens, "attention_mask": mask, **kinds}
    removed = seed % 4
    with torch.inference_mode():
        losses = [float(m.model(**batch, labels=labels).loss) for m in (vlm, apply(vlm, Plan(4, (removed,))))]
    base, without = ModelProbe(vlm, data).losses((), (removed,))
    assert [base, without[removed]] == pytest.approx(losses, abs=1e-4)


def test_losses_that_are_not_finite_are_refused(llama, samples):
    broken = replace(llama, model=copy.deepcopy(llama.model))
    mark = torch.eye(32)[0] * 1e4
    broken.layers[1].register_forward_hook(lambda _, args, out: out + mark)
    broken.layers[2].register_forward_hook(lambda _, args, out: out.where(out[..., :1] > 5e3, math.inf) - mark)
    probe = ModelProbe(broken, samples)
    assert probe.losses((), (0,))[1].keys() == {0}
    with pytest.raises(SvlError, match=r"loss of 'llama' without layer 1 is not finite.*choose another model\.dtype"):
        probe.losses((), (0, 1))
    broken.layers[3].register_forward_hook(lambda _, args, out: out * math.nan)
    with pytest.raises(SvlError, match=r"logits of 'llama' are not finite"):
        ModelProbe(broken, samples).losses((), (0,))


def test_samples_without_answers_are_refused(llava, samples):
    silent = Examples("silent", tuple(replace(e, answer="") for e in samples.items))
    with pytest.raises(SvlError, match=r"needs answers, but 5 .* have none \(row 0\)"):
        ModelProbe(llava, silent)


def test_what_was_measured_is_not_measured_again(llama, samples):
    known = {}

    def remember(what, inputs, compute):
        key = f"{what} {inputs}"
        if key not in known:
            known[key] = compute()
        return known[key]

    first = ModelProbe(llama, samples, remember=remember)
    short = Sleb().plan(replace(calibrate(llama, samples), probe=first), 1)
    again = ModelProbe(llama, samples, remember=remember)
    assert Sleb().plan(replace(calibrate(llama, samples), probe=again), 1) == short
    assert again.layer_forwards == 0
    assert first.layer_forwards > 0


class Counting:
    """A probe whose loss is the sum of what its removed layers cost."""

    def __init__(self, costs):
        self.costs, self.asked = costs, 0

    def take(self, samples):
        return self

    def losses(self, removed, candidates):
        base = sum(self.costs[i] for i in removed)
        self.asked += len(candidates)
        return base, {i: base + self.costs[i] for i in candidates}


@pytest.mark.parametrize(("n", "evaluations"), [(7, 189), (10, 255)])
def test_sleb_evaluates_as_often_as_its_paper(n, evaluations):
    costs = torch.randperm(32, generator=torch.Generator().manual_seed(n)).tolist()
    probe = Counting(costs)
    plan = Sleb().plan(Stats(32, tuple(range(32)), probe=probe), n)
    assert probe.asked == evaluations
    assert plan.removed == tuple(sorted(sorted(range(1, 31), key=costs.__getitem__)[:n]))


def test_sleb_decides_like_a_search_over_rebuilt_models(lm, samples):
    plan = Sleb().plan(replace(calibrate(lm, samples), probe=ModelProbe(lm, samples)), 2)
    removed = []
    for _ in range(2):
        alive = [i for i in range(4) if i not in removed]
        removed.append(min(alive[1:-1], key=lambda i: naive(lm, samples, (*removed, i))))
    assert plan.removed == tuple(sorted(removed))
    with pytest.raises(SvlError, match="after 2 of 3"):
        Sleb().plan(replace(calibrate(lm, samples), probe=ModelProbe(lm, samples)), 3)


def test_leaving_one_out(lm, samples):
    stats = replace(calibrate(lm, samples), probe=ModelProbe(lm, samples))
    base = naive(lm, samples, ())
    effect = [naive(lm, samples, (i,)) - base for i in range(4)]
    assert DepthShapley().plan(stats, 2).importance == pytest.approx(effect, abs=1e-5)
    assert ShortenedPpl(protected=(0, -1)).plan(stats, 1).removed == (min((1, 2), key=effect.__getitem__),)

    distance, n = 0.0, 0
    without = apply(lm, Plan(4, (2,)))
    for example in samples.items:
        inputs, answer = encode_answer(lm, example)
        with torch.inference_mode():
            change = lm.model(**inputs).logits[0] - without.model(**inputs).logits[0]
        where = answer.roll(-1)
        where[-1] = False
        distance, n = distance + float(change[where].norm(dim=-1).sum()), n + int(where.sum())
    assert DepthShapley("logits").plan(stats, 2).importance[2] == pytest.approx(distance / n, rel=1e-4)


def test_taylor_is_the_steepest_change_of_the_loss(llama, samples):
    """The loss changes by sum |W dL/dW| per unit of W + s |W| sign(dL/dW), which a finite difference sees."""
    salience = ModelProbe(llama, samples).taylor()
    for i in range(4):
        layer = llama.layers[i]
        weights = [p for n, p in layer.named_parameters() if not n.endswith("bias")]
        kept = [w.detach().clone() for w in weights]
        for w in weights:
            w.requires_grad_(True)
        total, n = 0.0, 0
        for example in samples.items:
            inputs, answer = encode_answer(llama, example)
            where = answer.nonzero()[:, 0]
            logits = llama.model(**inputs).logits[0]
            total = total + F.cross_entropy(logits[where - 1], inputs["input_ids"][0][where], reduction="sum")
            n += len(where)
        gradients = torch.autograd.grad(total / n, weights)
        signs = [w.detach().abs() * g.sign() for w, g in zip(weights, gradients, strict=True)]
        change = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for w, old, sign in zip(weights, kept, signs, strict=True):
                    w.copy_(old + step * sign)
            change.append(naive(llama, samples, ()))
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)
                w.requires_grad_(False)
        assert (change[0] - change[1]) / 2e-4 == pytest.approx(salience[i], rel=2e-2)
    plan = ShortenedTaylor(protected=(0,)).plan(replace(calibrate(llama, samples), probe=ModelProbe(llama, samples)), 1)
    assert plan.removed == (min((1, 2, 3), key=salience.__getitem__),)


def test_magnitudes_are_sums_over_a_layers_weights(qwen):
    sums = [0.0] * 4
    for name, tensor in qwen.model.state_dict().items():
        if name.startswith(qwen.anatomy.layers) and name.endswith("weight"):
            sums[int(name[len(qwen.anatomy.layers) + 1])] += float(tensor.double().abs().sum())
    probe = ModelProbe(qwen, None)
    assert probe.magnitude(1) == pytest.approx(sums, rel=1e-6)
    plan = ShortenedMagnitude(protected=(0, -1)).plan(Stats(4, (0, 1, 2, 3), probe=probe), 1)
    assert plan.removed == (min((1, 2), key=sums.__getitem__),)
    assert probe.magnitude(2) != probe.magnitude(1)


def test_protected_layers_count_from_both_ends():
    stats = Stats(8, tuple(range(8)), probe=Counting([5, 4, 3, 2, 1, 0, 0, 0]))
    assert ShortenedPpl(protected=(0, 1, -2, -1)).plan(stats, 2).removed == (4, 5)
    with pytest.raises(SvlError, match="at most 2 may go"):
        ShortenedPpl().plan(stats, 3)


# ------------------------------------------------------------------------------------------------ merging


def test_the_released_merge_keeps_the_last_layer_alone_and_the_papers_does_not():
    steps = ((5, (6, 7)), (4, (5,)))
    assert blends(steps[:1], "released") == {5: {7: 1.0}}
    assert blends(steps[:1], "paper") == {5: {5: -1.0, 6: 1.0, 7: 1.0}}
    assert blends(steps, "released") == {4: {7: 1.0}}
    assert blends(steps, "paper") == {4: {5: -1.0, 6: 1.0, 7: 1.0}}
    assert blends(((3, (4,)), (2, (3, 5))), "paper") == {2: {2: -1.0, 4: 1.0, 5: 1.0}}


@pytest.mark.parametrize("formula", ["paper", "released"])
def test_merged_weights_are_what_the_formula_says(lm, formula):
    plan = Plan(4, (2, 3))
    pruned = apply(lm, plan, Merge(formula).fit(None, plan))
    old = [dict(layer.named_parameters()) for layer in lm.layers]
    for name, now in pruned.layers[1].named_parameters():
        if now.ndim < 2 and "norm" in name:
            expected = old[1][name]
        elif formula == "released":
            expected = old[3][name]
        else:
            expected = old[2][name] + old[3][name] - old[1][name]
        torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-5)
    for (_, a), (_, b) in zip(pruned.layers[0].named_parameters(), lm.layers[0].named_parameters(), strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("formula", ["paper", "released"])
def test_laco_walks_down_as_its_threshold_lets_it(lm, samples, formula):
    probe = ModelProbe(lm, samples)
    stats = replace(calibrate(lm, samples), probe=probe)
    all_gone = Laco(formula, threshold=-1.0, size=2).plan(stats, 0)
    assert all_gone.removed == (1, 2)  # however low the threshold, the first and the last stay
    assert Laco(formula, threshold=1.0).plan(stats, 2).removed == ()
    found = Laco(formula, size=2).plan(stats, 2)
    assert len(found.removed) == 2
    again = Laco(formula, size=2, threshold=found.provenance["threshold"]).plan(stats, 0)
    assert (again.merges, again.provenance) == (found.merges, found.provenance)
    assert Plan.from_json(found.to_json()).merges == found.merges
    merged = Patch(blends=blends(found.merges, formula))
    assert Merge(formula).fit(None, found).blends == merged.blends

    pruned, total = apply(lm, found, merged), 0.0
    for example in samples.items:
        inputs, _ = encode_answer(lm, example)
        ends = []
        for model in (lm, pruned):
            with torch.inference_mode():
                last = model.model(**inputs, output_hidden_states=True).hidden_states[-1]
            ends.append(last.flatten())
        total += float(F.cosine_similarity(*ends, dim=0))
    assert probe.similarity(found, merged) == pytest.approx(total / 5, abs=1e-5)


class Similar:
    """A probe whose similarity is a fixed random number for every sequence of merges."""

    def take(self, samples):
        return self

    def similarity(self, plan, patch):
        return random.Random(str(plan.merges)).uniform(0.2, 1)


@pytest.mark.parametrize("seed", range(30))
def test_laco_walks_as_its_algorithm_says(seed):
    """The loop of the paper's Algorithm 1, written out, with C, I, H, L and a threshold by chance."""
    chance = random.Random(seed)
    depth, size, interval = chance.randint(9, 20), chance.randint(2, 5), chance.randint(1, 3)
    high, low, threshold = depth - 1 - chance.randint(0, 2), chance.randint(0, 2), chance.uniform(0.3, 0.9)
    merges, alive, at = (), list(range(depth)), high - size
    while at >= low:
        gone = tuple(alive[at + 1 : at + size])
        tried = (*merges, (alive[at], gone))
        plan = Plan(depth, tuple(i for _, layers in tried for i in layers), merges=tried)
        if Similar().similarity(plan, Patch()) > threshold:
            merges, alive = tried, [i for i in alive if i not in gone]
            at -= interval
        else:
            at -= 1
    walk = Laco("paper", threshold, size, interval, high, low)
    stats = Stats(depth, tuple(range(depth)), probe=Similar())
    assert walk.plan(stats, 3).merges == merges  # whatever the ratio
    protected = replace(stats, removable=tuple(range(depth // 2)))
    assert all(i < depth // 2 for _, gone in walk.plan(protected, 3).merges for i in gone)


def test_laco_that_cannot_reach_the_ratio_says_so():
    stats = Stats(8, tuple(range(8)), probe=Similar())
    assert len(Laco(size=3).plan(stats, 7).removed) == 7
    with pytest.raises(SvlError, match="reaches 6 removed layers only, not 7"):
        Laco(size=2).plan(stats, 7)
    for wrong in ({"size": 8}, {"highest": 8}, {"lowest": 5}):
        with pytest.raises(SvlError, match=r"does not fit between strategy\.lowest"):
            Laco(**wrong).plan(stats, 1)


# ------------------------------------------------------------------------------------- maps for gaps


class Stream:
    """Hidden states of one removed layer (1 of 3) whose effect is given; layer 0 writes M."""

    n_layers, writers = 3, ("attn", "mlp")

    def __init__(self, written, gap, weights=None, bias=False):
        self.weights = torch.ones(len(written)) if weights is None else weights
        self.written, self.gap, self.bias = written, gap, bias
        self.before = torch.randn(written.shape, generator=torch.Generator().manual_seed(9))

    def has_bias(self, layer, writer):
        return self.bias

    def stream(self, points=(), writers=(), plan=None, patch=None):
        assert (set(points), list(writers)) == ({1, 2}, [(0, "mlp")])
        yield self

    def h(self, i):
        return self.before if i == 1 else self.before + self.gap

    def wrote(self, layer, writer):
        return self.written


def rows(n, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


PLAN = Plan(3, (1,))


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_least_squares_finds_a_gap_that_is_linear(shrink):
    written, change = rows(200), rows(16, seed=1) / 4
    patch = Linear(ridge=0, shrink=shrink).fit(Stream(written, written @ change), PLAN)
    torch.testing.assert_close(patch.updates[0, "mlp"].left, change.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shrink", ["identity", "zero"])
def test_a_removed_layer_that_is_linear_is_replaced_exactly(shrink, llama, make_samples, encode):
    """Layer 2 adds a linear map of what the projection before it wrote: without it, the fitted model is the same."""
    data, change = make_samples([13] * 9, image=False), rows(32, 32, seed=4) / 32
    lvlm = replace(llama, model=copy.deepcopy(llama.model))
    written = []
    lvlm.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: written.append(out))
    lvlm.layers[2].register_forward_hook(lambda _, args, out: args[0] + written[-1] @ change)
    inputs = encode(lvlm, data.items)
    with torch.inference_mode():
        dense = lvlm.model(**inputs).logits
        plan = Plan(4, (2,))
        hidden = Activations(lvlm, data, select(calibrate(lvlm, data, statistics=()), All()))
        patch = Linear(ridge=0, shrink=shrink).fit(hidden, plan)
        pruned = [apply(lvlm, plan, p).model(**inputs).logits for p in (patch, Patch())]
    scale = float(dense.abs().max())
    torch.testing.assert_close(pruned[0], dense, atol=1e-4 * scale, rtol=0)
    assert (pruned[1] - dense).abs().max() > 1e-2 * scale


def test_least_squares_of_no_gap_is_the_identity():
    written = rows(50)
    for ridge in (0, 0.1):
        left = Linear(ridge=ridge).fit(Stream(written, 0 * written), PLAN).updates[0, "mlp"].left
        assert left.abs().max() < 1e-6
    assert not Linear().fit(Stream(written, 0 * written), Plan(3, ()))
    far = Linear(ridge=1e9, shrink="zero").fit(Stream(written, 0 * written), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(far, -torch.eye(16), atol=1e-3, rtol=0)  # a large ridge pulls T to zero


def test_the_ridge_means_the_same_at_any_scale_and_number_of_rows():
    written, gap = rows(60), rows(60, seed=1)
    fit = Linear(ridge=0.3).fit(Stream(written, gap), PLAN).updates[0, "mlp"].left
    double = Linear(ridge=0.3).fit(Stream(written.repeat(2, 1), gap.repeat(2, 1)), PLAN).updates[0, "mlp"].left
    scaled = Linear(ridge=0.3).fit(Stream(100 * written, 100 * gap), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(fit, double)
    torch.testing.assert_close(fit, scaled)


def test_least_squares_weighs_tokens():
    written, gap, weights = rows(80), rows(80, seed=1), torch.zeros(80)
    weights[:40] = 1
    half = Linear(ridge=0).fit(Stream(written[:40], gap[:40]), PLAN).updates[0, "mlp"].left
    picked = Linear(ridge=0, rows="selected").fit(Stream(written, gap, weights), PLAN).updates[0, "mlp"].left
    every = Linear(ridge=0, rows="all").fit(Stream(written, gap, weights), PLAN).updates[0, "mlp"].left
    torch.testing.assert_close(half, picked)
    assert (every - picked).abs().max() > 0.01


def test_too_few_tokens_need_a_ridge():
    written = rows(8)
    with pytest.raises(SvlError, match=r"set compensation\.ridge above 0"):
        Linear(ridge=0).fit(Stream(written, written), PLAN)
    assert Linear(ridge=1e-3).fit(Stream(written, written), PLAN)
    with pytest.raises(SvlError, match="leaves no token"):
        Linear(rows="selected").fit(Stream(written, written, torch.zeros(8)), PLAN)
    with pytest.raises(SvlError, match="not finite"):
        Linear().fit(Stream(written, written * float("inf")), PLAN)


def test_the_cosine_fit_turns_towards_the_gap():
    written, change = rows(400), rows(16, seed=1) / 4
    stream = Stream(written, written @ change)
    for accurate in (False, True):
        left = LinearCosine(lr=1e-2, epochs=60, batch=100, accurate=accurate).fit(stream, PLAN).updates[0, "mlp"].left
        moved = written + written @ left.T
        target = written + written @ change
        if accurate:
            moved, target = moved + stream.before - written, stream.h(2)
        assert 1 - F.cosine_similarity(moved, target, dim=-1).mean() < 0.02
    assert LinearCosine(epochs=0).fit(stream, PLAN).updates[0, "mlp"].left.abs().max() == 0


def test_the_mean_update_goes_into_a_bias_where_there_is_one():
    written, gap = rows(50), rows(50, seed=1) + 3
    update = MeanUpdate().fit(Stream(written, gap, bias=True), PLAN).updates[0, "mlp"]
    torch.testing.assert_close(update.shift, gap.mean(0))
    assert update.left is None

    constant = written.clone()
    constant[:, 0] = 2.0  # a coordinate that is always the same carries a constant exactly
    patch = MeanUpdate(ridge=0).fit(Stream(constant, gap), PLAN)
    update = patch.updates[0, "mlp"]
    torch.testing.assert_close(
        (constant @ update.right.T) @ update.left.T, gap.mean(0).expand(50, -1), atol=1e-4, rtol=0
    )
    assert "0% of it missed" in patch.notes[0]


@pytest.mark.parametrize("compensation", [Linear(ridge=1e-3), LinearCosine(lr=1e-3), MeanUpdate()])
def test_maps_bring_the_pruned_model_closer(lm, make_samples, compensation):
    data = make_samples([9, 12, 14, 10, 11, 13, 8, 12])
    stats = select(calibrate(lm, data), All())
    hidden, plan = Activations(lm, data, stats), Plan(4, (2,))
    patch = compensation.fit(hidden, plan)
    assert list(patch.updates) == [(1, "mlp")]

    def distance(patch):
        total = 0.0
        for a, b in zip(hidden.stream([3]), hidden.stream([3], plan=plan, patch=patch), strict=True):
            total += float(1 - F.cosine_similarity(a.h(3), b.h(3), dim=-1).mean())
        return total

    assert distance(patch) < distance(Patch())
    first = compensation.fit(hidden, Plan(4, (0,)))
    assert not first
    assert "layer 0" in first.notes[0]


def test_pruned_streams_keep_original_layer_numbers(lm, samples):
    """What is read and written in the pruned model is what hooks on it see."""
    plan = Plan(4, (1,))
    pruned = apply(lm, plan)
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    whole = Activations(pruned, samples, select(calibrate(pruned, samples), All()))
    ours = hidden.stream([0, 1, 2, 3, 4], [(2, "mlp"), (3, "attn")], plan)
    theirs = whole.stream([0, 1, 2, 3], [(1, "mlp"), (2, "attn")])
    for a, b in zip(ours, theirs, strict=True):
        for i, j in {0: 0, 1: 1, 2: 1, 3: 2, 4: 3}.items():
            assert torch.equal(a.h(i), b.h(j))
        for (i, j), role in zip(((2, 1), (3, 2)), ("mlp", "attn"), strict=True):
            assert torch.equal(a.read(i, role), b.read(j, role))
            assert torch.equal(a.wrote(i, role), b.wrote(j, role))
        after = a.h(2) + a.wrote(2, "mlp")
        assert not torch.equal(after, a.h(3))  # attention writes, too


def test_one_calibration_serves_every_method(llava, samples):
    forwards = []
    handle = llava.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    stats = calibrate(llava, samples, batch_size=2)
    for selector in (All(), Last()):
        for strategy in (Cosine(), Angular(), Streamline(), Interlace(), Spaced()):
            for n in (1, 2):
                strategy.plan(select(stats, selector), n)
    handle.remove()
    assert len(forwards) == 3  # batches of one pass


def test_answers_of_every_kind_are_found(qwen):
    one = Example(0, "x", answer="the of and")
    with pytest.raises(SvlError, match="adds no token"):
        encode_answer(qwen, replace(one, answer=""))


# ------------------------------------------------------------------------------------------------- refit


def test_a_walk_visits_kept_layers_with_the_states_of_both_models(lm, samples):
    """Without changes, what layers give out is the pruned model's stream, and what they should is the dense one's."""
    plan = Plan(4, (2,))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    dense = list(hidden.stream([3, 4]))
    pruned = list(hidden.stream([3, 4], [(1, "mlp"), (3, "mlp")], plan))
    seen = []
    for step in hidden.walk(plan):
        seen.append(step.layer)
        after = {1: 3, 3: 4}[step.layer]  # the dense state that the next kept layer gets
        for (x, out, wanted, w), d, p in zip(step.rows("mlp"), dense, pruned, strict=True):
            torch.testing.assert_close(x, p.read(step.layer, "mlp"), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out, p.h(after), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(wanted, d.h(after), atol=1e-4, rtol=1e-4)
            assert torch.equal(w, d.weights)
    assert seen == [1, 3]


def test_a_walk_goes_on_with_what_was_changed(lm, samples):
    plan = Plan(4, (2,))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    width = lm.layers[1].get_submodule(lm.anatomy.writers["mlp"][1].module).weight.shape
    delta = torch.randn(width, generator=torch.Generator().manual_seed(3)) / 20
    changed = list(hidden.stream([3, 4], plan=plan, patch=Patch({(1, "mlp"): Update(delta=delta)})))
    for step in hidden.walk(plan):
        if step.layer == 1:
            step.change("mlp", delta)
        after = {1: 3, 3: 4}[step.layer]
        for (_, out, _, _), p in zip(step.rows("mlp"), changed, strict=True):
            torch.testing.assert_close(out, p.h(after), atol=1e-4, rtol=1e-4)


def test_refit_is_the_regression_it_says(lm, samples):
    """Against a dense solve over all tokens at once, for the layer before the gap."""
    plan = Plan(4, (1, 2))
    hidden = Activations(lm, samples, select(calibrate(lm, samples), All()))
    patch = Refit(ridges=(0.5,), targets=("mlp",)).fit(hidden, plan)
    assert list(patch.updates) == [(0, "mlp"), (3, "mlp")]
    x, gap, scale = [], [], []
    for sample in hidden.stream([1, 3], [(0, "mlp")]):
        x.append(sample.read(0, "mlp").double())
        gap.append((sample.h(3) - sample.h(1)).double())
        scale.append(sample.h(3).double().square().sum(-1))
    x, gap, root = torch.cat(x), torch.cat(gap), torch.cat(scale).rsqrt()[:, None]
    ridge = 0.5 * (root * x).square().sum(0).mean()
    stacked = torch.cat([root * x, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([root * gap, torch.zeros(x.shape[1], gap.shape[1], dtype=x.dtype)])
    exact = torch.linalg.lstsq(stacked, target).solution.mT
    torch.testing.assert_close(patch.updates[0, "mlp"].delta.double(), exact, atol=1e-4, rtol=1e-3)


def test_refit_brings_the_pruned_model_closer_than_one_map_does(lm, make_samples):
    data = make_samples([9, 12, 14, 10, 11, 13, 8, 12, 9, 10])
    hidden, plan = Activations(lm, data, select(calibrate(lm, data), All())), Plan(4, (1,))

    def distance(patch):
        pairs = zip(hidden.stream([4]), hidden.stream([4], plan=plan, patch=patch), strict=True)
        return sum(float(((a.h(4) - b.h(4)).norm(dim=-1) / a.h(4).norm(dim=-1)).mean()) for a, b in pairs)

    errors = [distance(p) for p in (Refit().fit(hidden, plan), Refit(layers="gaps").fit(hidden, plan), Patch())]
    assert errors == sorted(errors)
    assert Refit(layers="gaps").fit(hidden, plan).updates.keys() == {(0, "mlp"), (0, "attn")}
    assert not Refit().fit(hidden, Plan(4, ()))
    for wrong in (
        {"ridges": ()},
        {"ridges": (0.0,)},
        {"fold": 1},
        {"layers": "some"},
        {"rows": "none"},
        {"targets": ("qkv",)},
    ):
        with pytest.raises(SvlError, match=f"compensation.{next(iter(wrong))}"):
            Refit(**wrong)


def test_layers_that_cannot_run_alone_are_refused(llama, samples):
    owner = llama.model.get_submodule(llama.anatomy.layers.rpartition(".")[0])
    layer, forward = owner.layers[2], owner.layers[2].forward
    calls = []

    def moody(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs) * (1 if len(calls) % 2 else 2)

    layer.forward = moody
    try:
        with pytest.raises(SvlError, match="does more between its decoder layers"):
            record(llama, encode_answer(llama, samples.items[0])[0], 0, check=True)
    finally:
        layer.forward = forward


def test_a_regression_adds_up():
    x, y, w = rows(30, 4), rows(30, 3, seed=1), torch.rand(30, generator=torch.Generator().manual_seed(2))
    whole, first, second = Regression(), Regression(), Regression()
    whole.add(x, y, w)
    first.add(x[:10], y[:10], w[:10])
    second.add(x[10:], y[10:], w[10:])
    torch.testing.assert_close(whole.solve(0.1), first.with_rows_of(second).solve(0.1))
    solution = whole.solve(0)
    left = (w[:, None] * (y - x @ solution.float()) ** 2).sum() / (w[:, None] * y**2).sum()
    assert whole.left_over(solution) == pytest.approx(float(left), abs=1e-5)
    assert whole.left_over(0 * solution) == 1
