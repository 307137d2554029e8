"""A result is either reported or named as damaged, whatever a store holds."""

import copy
import io
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.results import result
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from svl.report import pictures
from svl.report.experiment_report import Report
from svl.report.result_check import problem_of
from svl.store.artifacts import Store

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([0.5, -1.5, 1e300, float("inf"), float("nan")]),
    st.text(max_size=3),
    st.sampled_from([[], [1], ["a"], [[]], {}, {"a": 1}, {"value": "x"}, {"value": None}]),
)
MEASURED = {"speedup": {"total": {"value": 1.4}}, "device": {"type": "cpu", "name": "x"}}


def paths(tree, path=()):
    """Where nested mappings and lists have values."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from paths(value, (*path, name))


WHOLE = result(keys={"evaluate": ["gone"], "dense": ["gone"], "compensate": ["gone"]}, efficiency=MEASURED)


def damaged(path, value):
    """A result with another value at a path; without it, if the value is Ellipsis."""
    body = copy.deepcopy(WHOLE)
    place = body
    for name in path[:-1]:
        place = place[name]
    if value is Ellipsis:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return body


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(paths(WHOLE))), st.one_of(VALUES, st.just(Ellipsis)))
def test_a_result_is_reported_or_named(path, value):
    body = damaged(path, value)
    with tempfile.TemporaryDirectory() as folder, patch.object(pictures, "draw_figures", lambda *_: []):
        store = Store(Path(folder) / "store")
        store.make("run", {"number": 1}, lambda _: body)
        store.make("run", {"number": 2}, lambda _: result("other", level=0.5))
        report = Report.read(store, "demo") if path != ("model_fingerprint",) else None
        if report is None:
            return
        report.show(Console(file=io.StringIO()))
        report.write(Path(folder) / "out")
        is_read = problem_of(body) is None and body.get("name") == "demo"
        assert len(report.runs) == (2 if is_read else 1)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("cost",), ..., "'cost' is missing"),
        (("seed",), "0", "'seed' is of the wrong kind"),
        (("ratio",), True, "'ratio' is of the wrong kind"),
        (("ratio",), float("nan"), "the ratio is nan"),
        (("plan", "removed"), [7, 7], "removes layers [7, 7]"),
        (("plan", "importance"), ["a"] * 8, "the importance of a layer is 'a'"),
        (("scores", "demo_yes", "metric"), "f2", "the scores of 'demo_yes' lack the main metric"),
        (("average", "value"), "0.5", "'average' has something else than numbers"),
        (("keys", "dense"), [1], "the keys of 'dense' are no list of names"),
        (("settings", "selector"), None, "the settings of 'selector' are no mapping"),
    ],
)
def test_what_is_wrong_is_said(path, value, problem):
    assert problem in (problem_of(damaged(path, value)) or "")


def test_what_stands_for_other_things_is_no_result():
    for other in (None, [], "result", 3):
        assert problem_of(other) == "'name' is missing"
    assert problem_of(WHOLE) is None
