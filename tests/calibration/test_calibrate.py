"""Calibration against slow references: hidden states and attention maps of eager attention, plain Python loops."""

from __future__ import annotations

import copy
import itertools
import math
import operator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from svl.calibration import attention
from svl.calibration.activations import Activations
from svl.calibration.calibrate import FIELDS, calibrate, measure_batch, select
from svl.core import Plan, Stats, SvlError
from svl.core.methods import STATISTICS
from svl.data.samples import Samples
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.pruning.surgery import apply
from svl.selectors.all_tokens import All
from svl.selectors.random import Random
from svl.selectors.tis import Tis
from svl.selectors.visual import Visual

VISUAL, TEXT = 0, 1
TIS_CHOICES = {
    "rule": ("fraction", "nucleus"),
    "pool": ("joint", "modality"),
    "layers": ("mean", "each", "2"),
    "text_self": ("received", "emitted"),
    "visible": (True, False),
}
TIS_SETTINGS = [
    dict(zip(("p", *TIS_CHOICES), values, strict=True))
    for values in itertools.product((0.2, 0.55), *TIS_CHOICES.values())
]


# ------------------------------------------------------------------------------------------ references


def states_and_maps(lvlm: Lvlm, inputs: dict) -> tuple[list, list]:
    """h_0 .. h_L of one sample, and its attention maps averaged over heads: nested lists [L + 1][T][d], [L][T][T]."""
    model = copy.deepcopy(lvlm.model)
    model.set_attn_implementation("eager")
    leaves: list[torch.Tensor] = []  # the last of `hidden_states` is normed: a hook gets what leaves the last layer
    model.get_submodule(lvlm.anatomy.layers)[-1].register_forward_hook(
        lambda _, __, out: leaves.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        out = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    states = [*out.hidden_states[:-1], leaves[0]]
    return [h[0].double().tolist() for h in states], [a[0].double().mean(0).tolist() for a in out.attentions]


def cosine(a: list[float], b: list[float]) -> float:
    def dot(x: list[float], y: list[float]) -> float:
        return sum(map(operator.mul, x, y))

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def tis_scores(maps: list, visual: list[bool], p, rule, pool, layers, text_self, visible) -> list[list[float]]:
    """TIS of every token by its definition: one list, or one per layer with `layers=each`."""
    T = len(visual)
    V, S = [i for i in range(T) if visual[i]], [i for i in range(T) if not visual[i]]

    def of(A: list, i: int) -> float:
        def received(queries: list[int]) -> float:
            return mean([A[q][i] for q in queries if q >= i or not visible])

        def emitted(keys: list[int]) -> float:
            return mean([A[i][k] for k in keys if k <= i or not visible])

        if visual[i]:
            return (received(V) + received(S)) / 2
        return (emitted(V) + (received(S) if text_self == "received" else emitted(S))) / 2

    scores = [[of(A, i) for i in range(T)] for A in maps]
    if layers == "each":
        return scores
    return [[mean(list(column)) for column in zip(*scores, strict=True)] if layers == "mean" else scores[int(layers)]]


def tis_marks(scores: list[float], visual: list[bool], p, rule, pool, **_) -> list[float]:
    """1 for the important tokens."""
    T = len(visual)
    marks = [0.0] * T
    for members in (range(T),) if pool == "joint" else ([i for i in range(T) if visual[i] == m] for m in (True, False)):
        ranked = sorted(members, key=lambda i: (-round(math.log(scores[i] or 1e-99), 5), i))
        n = math.ceil(round(p * len(ranked), 6))
        if rule == "nucleus":
            total = sum(scores[i] for i in ranked)
            n = next(n for n in range(1, T + 1) if sum(scores[i] for i in ranked[:n]) >= p * total)
        for i in ranked[:n]:
            marks[i] = 1.0
    return marks


@pytest.fixture(scope="module")
def references(llava, qwen, samples, encode):
    """(is visual, states, maps) of every sample, each by a forward pass of its own."""

    def of(lvlm: Lvlm) -> list:
        inputs = [encode(lvlm, [sample]) for sample in samples.samples]
        visual = [(i["input_ids"][0] == lvlm.anatomy.image_token_id).tolist() for i in inputs]
        return [(v, *states_and_maps(lvlm, i)) for v, i in zip(visual, inputs, strict=True)]

    return {"llava": of(llava), "qwen": of(qwen)}


@pytest.fixture(scope="module")
def traces(llava, qwen, samples):
    """Traces by (model, batch size): 5 pads every sample to the longest, 1 none."""
    return {
        (lvlm.name, size): list(calibrate(lvlm, samples, batch_size=size).traces)
        for lvlm in (llava, qwen)
        for size in (5, 1)
    }


def close(ours: torch.Tensor, reference: list) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(reference, dtype=torch.float64), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- measurements


@pytest.mark.parametrize("size", [5, 1])
def test_samples_are_padded_and_attention_is_uneven(vlm, size, references, traces):
    """What the other tests rest on: their agreement would mean little on uniform maps or equal lengths."""
    visual, _, maps = zip(*references[vlm.name], strict=True)
    assert len({len(v) for v in visual}) > 2
    assert [t.visual.tolist() for t in traces[vlm.name, size]] == list(visual)
    last_rows = torch.tensor([maps[0][layer][-1] for layer in range(4)])
    assert (last_rows.amax(1) > 2 * last_rows.mean(1)).all()


@pytest.mark.parametrize("size", [5, 1])
def test_block_influence_equals_the_definition(vlm, size, references, traces):
    tokens: list[list[float]] = [[], [], [], []]
    for (_, states, _), trace in zip(references[vlm.name], traces[vlm.name, size], strict=True):
        cosines = [[cosine(a, b) for a, b in zip(states[i], states[i + 1], strict=True)] for i in range(4)]
        close(trace.cosine, cosines)
        for layer, row in zip(tokens, cosines, strict=True):
            layer += row
    stats = Stats(4, (0, 1, 2, 3), traces[vlm.name, size], All())
    close(1 - stats.cosine(), [1 - mean(row) for row in tokens])


@pytest.mark.parametrize("size", [5, 1])
@pytest.mark.parametrize("chunk", [64, 7])
def test_attention_sums_equal_eager_maps(vlm, size, chunk, references, samples, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    for (visual, _, maps), trace in zip(
        references[vlm.name], calibrate(vlm, samples, batch_size=size).traces, strict=True
    ):
        T = len(visual)
        assert chunk < T or chunk == 64
        of = {m: [i for i in range(T) if visual[i] == (m == VISUAL)] for m in (VISUAL, TEXT)}
        close(trace.received, [[[sum(A[q][k] for q in of[m]) for k in range(T)] for m in of] for A in maps])
        close(trace.emitted, [[[sum(A[q][k] for k in of[m]) for q in range(T)] for m in of] for A in maps])
        close(trace.queries, [[[sum(q >= k for q in of[m]) for k in range(T)] for m in of]])
        close(trace.keys, [[[sum(k <= q for k in of[m]) for q in range(T)] for m in of]])


def test_measuring_attention_does_not_change_the_model_output(lm, samples, encode):
    inputs = encode(lm, samples.samples)
    present = inputs["attention_mask"].bool()
    with torch.inference_mode():
        plain = lm.model(**inputs).logits
        with attention.metering(lm.model, torch.stack([present, 0 * present], 1).float()) as meter:
            measured = lm.model(**inputs).logits
    torch.testing.assert_close(measured[present], plain[present], atol=1e-5, rtol=1e-5)
    for sums in (meter.received, meter.emitted, meter.queries, meter.keys):  # padding takes no part
        assert all(of[:, 0][present].any() and not of.mT[~present].any() for of in sums.values())


def test_measuring_waits_for_a_device_no_more_often_in_deeper_models(llama, samples, encode):
    """A number that is read on the host holds up all that comes after it."""
    numbers = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            numbers[-1] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    inputs = encode(llama, samples.samples)
    present = inputs["attention_mask"].bool()
    assert not present.all()
    for lvlm in (llama, apply(llama, Plan(4, (1, 2)))):
        numbers.append(0)
        modality = torch.stack([present, 0 * present], 1).float()
        with torch.inference_mode(), attention.metering(lvlm.model, modality), Watch():
            lvlm.model(**inputs)
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("layer_types", ["sliding_attention", "full_attention"])
def test_softcap_and_sliding_windows_equal_eager_maps(layer_types, llama, make_samples, encode, randomise):
    """Gemma 2: capped scores; with a window shorter than the text, layers differ in what they see."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, sliding_window=6,
        layer_types=[layer_types, "full_attention"],
    )  # fmt: skip
    model = randomise(Gemma2ForCausalLM(config))
    lvlm = Lvlm(model, llama.processor, find_anatomy(model))
    text = make_samples([9, 4, 7], image=False)
    for sample, trace in zip(text.samples, calibrate(lvlm, text).traces, strict=True):
        _, maps = states_and_maps(lvlm, encode(lvlm, [sample]))
        A = torch.tensor(maps)
        close(trace.received[:, TEXT], A.sum(1).tolist())
        close(trace.emitted[:, TEXT], A.sum(2).tolist())
        close(trace.queries[:, TEXT].expand(2, -1), (A > 0).sum(1).tolist())
        close(trace.keys[:, TEXT].expand(2, -1), (A > 0).sum(2).tolist())
        assert not trace.received[:, VISUAL].any()
        assert not trace.emitted[:, VISUAL].any()
        assert (maps[0][-1][0] == 0) == (layer_types == "sliding_attention")


# ------------------------------------------------------------------------------------------------- TIS


@pytest.mark.parametrize("chosen", TIS_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_tis_equals_the_definition(chosen, vlm, references, traces):
    selector = Tis(**chosen)
    selected: list[list[float]] = [[], [], [], []]
    for (visual, states, maps), padded, alone in zip(
        references[vlm.name], traces[vlm.name, 5], traces[vlm.name, 1], strict=True
    ):
        scores = tis_scores(maps, visual, **chosen)
        marks = [tis_marks(row, visual, **chosen) for row in scores]
        for trace in (padded, alone):
            close(selector.scores(trace).reshape(len(scores), -1), scores)
            assert selector.weights(trace).reshape(len(scores), -1).tolist() == marks
        for i, layer in enumerate(selected):
            row = marks[i % len(marks)]
            layer += [cosine(states[i][t], states[i + 1][t]) for t in range(len(row)) if row[t]]
    for size in (5, 1):
        close(Stats(4, (0, 1, 2, 3), traces[vlm.name, size], selector).cosine(), [mean(row) for row in selected])


def test_every_tis_setting_matters(qwen, traces):
    """Each choice changes the marks of some sample, so the test above sees all of them."""
    base = Tis(p=0.3)
    for name, values in {"p": (0.6,), **{k: v[1:] for k, v in TIS_CHOICES.items()}}.items():
        for value in values:
            other = Tis(**{"p": 0.3, name: value})
            assert any(not torch.equal(*torch.broadcast_tensors(base.weights(t), other.weights(t)))
                       for t in traces["qwen", 5]), name  # fmt: skip


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_massive_activations_in_half_precision_give_correct_cosines(dtype, llava, samples):
    """One dimension of one token holds 2e4, as in real models: its square is beyond what half precision can hold."""
    model = copy.deepcopy(llava.model).to(dtype)
    lvlm = Lvlm(model, llava.processor, llava.anatomy)
    model.get_input_embeddings().weight.data[2, 5] = 2e4  # the first token of every sample
    states: list[torch.Tensor] = []
    for layer in lvlm.layers:
        layer.register_forward_hook(lambda _, args, out: states.extend([args[0][0], out[0]]))
    (trace,) = measure_batch(lvlm, samples.samples[:1], STATISTICS).traces()
    assert states[-1].dtype == dtype
    assert states[-1].abs().max() >= 1e4
    tokens = [[h.double().tolist() for h in state] for state in states]
    exact = [[cosine(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(tokens[::2], tokens[1::2], strict=True)]
    close(trace.cosine, exact)
    assert all(getattr(trace, field).isfinite().all() for field in FIELDS)


def test_a_zero_state_has_cosine_zero(llama, make_samples):
    """The embedding of a padding token that occurs in a text is zero: it must not turn the mean into nan."""
    model = copy.deepcopy(llama.model)
    model.get_input_embeddings().weight.data[2] = 0
    lvlm = Lvlm(model, llama.processor, llama.anatomy)
    (trace,) = measure_batch(lvlm, make_samples([4], image=False).samples, ["cosine"]).traces()
    assert trace.cosine is not None
    assert trace.cosine[0, 0] == 0
    assert trace.cosine.isfinite().all()


# ---------------------------------------------------------------------------------------- independence


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_results_do_not_depend_on_batch_size_or_padding(vlm, make_samples, lengths, size, seed):
    data = make_samples(lengths, seed=seed)
    alone, together = (list(calibrate(vlm, data, batch_size=n).traces) for n in (1, size))
    for a, b in zip(alone, together, strict=True):
        assert (a.index, a.visual.tolist()) == (b.index, b.visual.tolist())
        for field in FIELDS[1:]:
            torch.testing.assert_close(getattr(a, field), getattr(b, field), atol=1e-5, rtol=0)


def test_samples_with_and_without_pictures_share_a_batch(vlm, make_samples):
    seen, unseen = make_samples([4, 8]).samples[0], make_samples([4, 8], image=False).samples[1]
    mixed = calibrate(vlm, Samples("mixed", (seen, unseen)))
    alone = [measure_batch(vlm, [sample], ["cosine"]).traces()[0] for sample in (seen, unseen)]
    assert [bool(t.visual.any()) for t in mixed.traces] == [True, False]
    for a, b in zip(mixed.traces, alone, strict=True):
        torch.testing.assert_close(a.cosine, b.cosine, atol=1e-5, rtol=0)


def test_same_seed_same_numbers_bit_for_bit(lm, samples):
    measure = {"statistics": STATISTICS, "batch_size": 2}
    first, second = (list(calibrate(lm, samples, **measure).traces) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for field in FIELDS:
            assert torch.equal(getattr(a, field), getattr(b, field))
    assert all(torch.equal(Random(seed=3).weights(t), Random(seed=3).weights(t)) for t in first)
    assert any(not torch.equal(Random(seed=3).weights(t), Random(seed=4).weights(t)) for t in first)


def test_traces_in_a_folder_equal_those_in_memory(lm, samples, tmp_path):
    memory = calibrate(lm, samples, statistics=STATISTICS, batch_size=2)
    stored = calibrate(lm, samples, statistics=STATISTICS, batch_size=2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for _ in range(2):  # read again on every use
        for a, b in zip(memory.traces, stored.traces, strict=True):
            assert a.index == b.index
            for field in FIELDS:
                assert torch.equal(getattr(a, field), getattr(b, field))
    assert torch.equal(select(memory, All()).cosine(), select(stored, All()).cosine())


def test_many_samples_keep_their_order_in_a_folder(llama, make_samples, tmp_path):
    data = make_samples([1] * 12, image=False)
    stored = calibrate(llama, data, statistics=["cosine"], batch_size=12, folder=tmp_path)
    assert [t.index for t in stored.traces] == list(range(12))


def test_only_what_is_asked_for_is_measured(llava, samples):
    (a,), (b,) = (measure_batch(llava, samples.samples[:1], [what]).traces() for what in ("cosine", "attention"))
    assert a.cosine is not None
    assert a.received is None
    assert b.received is not None
    assert b.cosine is None
    with pytest.raises(SvlError, match="did not measure 'attention'"):
        Tis().weights(a)
    with pytest.raises(SvlError, match="did not measure 'cosine'"):
        Stats(4, (0, 1, 2, 3), [b], All()).cosine()


# ------------------------------------------------------------------------------- the model stays as is


def condition(model) -> tuple:
    """Everything about a model that calibration might leave changed."""
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
    used = [m.config._attn_implementation for m in modules if hasattr(m, "config")]
    return hooks, used, [(id(p), p._version, p.requires_grad) for p in model.parameters()], model.training


def test_calibration_leaves_the_model_as_it_was(lm, samples):
    calibrate(lm, samples)  # transformers installs hooks of its own on first use
    before, weights = condition(lm.model), {k: v.clone() for k, v in lm.model.state_dict().items()}
    calibrate(lm, samples)
    list(Activations(lm, samples, calibrate(lm, samples)).stream([0, 2]))
    assert condition(lm.model) == before
    assert all(torch.equal(v, weights[k]) for k, v in lm.model.state_dict().items())
    assert "svl" not in before[1]


def test_an_interrupted_calibration_leaves_the_model_as_it_was(vlm, samples):
    calibrate(vlm, samples)
    before = condition(vlm.model)
    handle = vlm.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(SvlError, match="ZeroDivisionError"):
        calibrate(vlm, samples)
    handle.remove()
    assert condition(vlm.model) == before


def test_the_vision_tower_is_not_measured(vlm, samples):
    """Its layers have the numbers of decoder layers and would overwrite their sums."""
    used = set()
    tower = next(m for n, m in vlm.model.named_modules() if n.split(".")[-1] in ("vision_tower", "visual"))
    handle = tower.register_forward_hook(lambda m, *_: used.add(m.config._attn_implementation))
    calibrate(vlm, samples)
    handle.remove()
    assert used == {"sdpa"}


# --------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("size", [1, 5])
def test_streamed_hidden_states_equal_the_model_own(vlm, size, samples, references):
    stats = select(calibrate(vlm, samples), Visual())
    hidden = Activations(vlm, samples, stats, batch_size=size)
    assert (hidden.n_layers, tuple(hidden.writers)) == (4, ("attn", "mlp"))
    streamed = list(hidden.stream([4, 0, 2]))  # in any order
    for (visual, states, _), sample in zip(references[vlm.name], streamed, strict=True):
        assert sample.weights.tolist() == [[float(v) for v in visual]] * 4
        for i in (0, 2, 4):
            assert sample.h(i).dtype == torch.float32
            torch.testing.assert_close(sample.h(i), torch.tensor(states[i]), atol=2e-5, rtol=1e-5)


def test_streaming_stops_at_the_deepest_point(llava, samples):
    ran = []
    handle = llava.layers[2].register_forward_hook(lambda *_: ran.append(2))
    list(Activations(llava, samples, calibrate(llava, samples, statistics=[])).stream([0, 2]))
    assert len(ran) == 1  # calibration only: h_2 is at hand before layer 2 runs
    handle.remove()


def test_streaming_leaves_no_inference_mode_behind(llava, samples):
    stream = Activations(llava, samples, calibrate(llava, samples, statistics=[])).stream([1])
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert not llava.layers[1]._forward_pre_hooks


# ---------------------------------------------------------------------------------------------- errors


def test_attention_sinks_are_refused_with_a_way_out():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(SvlError, match=r"sinks.*calibration\.statistics"):
        attention.measured_attention(None, q, q, q, None, s_aux=torch.zeros(1))


def test_layers_without_attention_maps_are_an_error_that_names_them(llama, make_samples, randomise):
    """A hybrid: layer 0 is a convolution. Cosines need no maps."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = randomise(Lfm2ForCausalLM(config))
    lvlm = Lvlm(model, llama.processor, find_anatomy(model, "model.layers"))
    text = make_samples([4], image=False)
    with pytest.raises(SvlError, match=r"layers \[0\] .*calibration\.statistics"):
        calibrate(lvlm, text)
    (trace,) = calibrate(lvlm, text, statistics=["cosine"]).traces
    assert trace.cosine.shape == (2, len(trace.visual))
