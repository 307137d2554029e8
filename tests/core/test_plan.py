"""Plans: one rounding rule, what a plan may be, its JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svl.core import Plan, SvlError, layers_to_remove


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
    stepwise = Plan(5, (3, 1), order=(3, 1))
    assert Plan.from_json(stepwise.to_json()) == stepwise != Plan(5, (3, 1), order=(1, 3))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 4.0}, "n_layers of a plan is 4.0, but must be a whole number"),
        ({"n_layers": True}, "n_layers of a plan is True"),
        ({"n_layers": 0, "removed": []}, "removes all 0 decoder layers"),
        ({"removed": [1.9]}, "a removed layer is 1.9, but must be a whole number"),
        ({"removed": ["1"]}, "a removed layer is '1'"),
        ({"removed": "12"}, "must be lists"),
        ({"removed": {"1": 2}}, "must be lists"),
        ({"removed": [True]}, "a removed layer is True"),
        ({"removed": [None]}, "a removed layer is None"),
        ({"removed": [float("inf")]}, "a removed layer is inf"),
        ({"importance": [0, 1, float("nan"), 2]}, "importance of a layer is nan, but must be a finite number"),
        ({"importance": [0, 1, float("inf"), 2]}, "importance of a layer is inf"),
        ({"importance": [0, 1, "3", 2]}, "importance of a layer is '3'"),
        ({"importance": [0, 1, [3], 2]}, r"importance of a layer is \[3\]"),
        ({"importance": {"0": 1}}, "must be lists"),
        ({"merges": {"0": [1]}}, "must be lists"),
        ({"merges": [[0, "1"]]}, "pairs of a layer and a list of layers"),
        ({"merges": [[0.5, [1]]]}, "a merged layer is 0.5"),
        ({"merges": [[9, [1]]]}, r"merges layers \[1\] away, but removes \[1\]"),
        ({"merges": [[1, [1]]]}, "merges layer 1 into itself"),
        ({"order": "1"}, "must be lists"),
        ({"order": [True]}, "a layer in the order of removal is True"),
        ({"order": [1, 2]}, r"removes layers in the order \[1, 2\], but removes \[1\]"),
        ({"n_layers": 10**13}, "for 10000000000000 decoder layers, but no model has more than 100000"),
        ({"removed": [1] * 10**5}, r"plan removes layers \[1, 1, 1, .*\.\.\.\], but the model has"),
        ({"kept": [0, 1, 2, 3]}, "kept and removed contradict each other"),
        ({"merges": [[0, [2]]]}, r"merges layers \[2\] away, but removes \[1\]"),
    ],
)  # fmt: skip
def test_numbers_of_a_plan_are_what_they_must_be(change, message):
    plan = {"n_layers": 4, "removed": [1]}
    Plan.from_json(json.dumps(plan))
    with pytest.raises(SvlError, match=f"^not a plan: .*{message}") as error:
        Plan.from_json(json.dumps(plan | change))
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("1b.", max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("1b.", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("n_layers", "removed", "importance", "merges", "kept"), JSON)))
def test_any_json_is_a_plan_or_one_line(body):
    """What is read has the numbers that the text has."""
    text = json.dumps(body)
    try:
        plan = Plan.from_json(text)
    except SvlError:
        with pytest.raises(SvlError, match=r"^not a plan: [^\n]+$"):
            Plan.from_json(text)
        return
    assert type(body["n_layers"]) is int
    assert plan.n_layers == body["n_layers"] > len(plan.removed)
    assert list(plan.removed) == sorted(body["removed"])
    assert set(plan.kept) | set(plan.removed) == set(range(plan.n_layers))
    assert list(plan.importance) == list(body.get("importance") or ())
    assert all(math.isfinite(x) for x in plan.importance)


@given(st.data())
def test_every_possible_plan_survives_its_json(data):
    n_layers = data.draw(st.integers(1, 40))
    removed = data.draw(st.sets(st.integers(0, n_layers - 1), max_size=n_layers - 1))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    importance = data.draw(st.just([]) | st.lists(finite, min_size=n_layers, max_size=n_layers))
    plan = Plan(n_layers, tuple(removed), tuple(importance))
    assert Plan.from_json(plan.to_json()) == plan


def test_numbers_of_numpy_and_torch_are_numbers():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    plan = Plan(numpy.int64(3), (numpy.int32(1),), (numpy.float32(0.5), torch.tensor(0.25), 1))
    assert plan == Plan(3, (1,), (0.5, 0.25, 1.0))
    assert json.loads(plan.to_json())["importance"] == [0.5, 0.25, 1.0]


NO_PLANS = (
    "", "[1]", "{", "null", "[" * 100_000, '{"a":' * 100_000, '{"n_layers": 4}', '{"n_layers": "x", "removed": []}',
    '{"n_layers": 4, "removed": 3}', '{"n_layers": null, "removed": []}',
)  # fmt: skip


@pytest.mark.parametrize("text", NO_PLANS, ids=lambda text: text[:20])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(SvlError, match="not a plan"):
        Plan.from_json(text)
