"""From runs to rows: what is compared, and numbers over seeds worked out by hand."""

from unittest.mock import patch

import pytest
from helpers.results import result

from svl.report.experiment_report import Report
from svl.report.notes import table_notes
from svl.report.page import render_page
from svl.report.rows import Estimate, pool_estimates


def test_several_seeds_give_a_mean_with_the_errors_of_both():
    assert pool_estimates([Estimate(0.5, 0.1)]) == Estimate(0.5, 0.1)
    pooled = pool_estimates([Estimate(0.3, 9), Estimate(0.4, 9), Estimate(0.5, None)])
    assert pooled.value == pytest.approx(0.4)
    assert pooled.draws == pytest.approx(0.1 / 3**0.5)
    assert pooled.questions == pytest.approx(9)  # one set of questions for all seeds
    assert pooled.error == pytest.approx((81 + 0.01 / 3) ** 0.5)
    assert pool_estimates([Estimate(0.3), Estimate(None)]) == Estimate(None, None)


def test_unlike_runs_are_in_different_tables(store):
    store.add(result(), result(limit=5), result(model="other", model_fingerprint="ba5"))
    scored = result()["scores"]
    store.add(result(scores={"demo_yes": scored["demo_yes"]}))
    sections = Report.read(store, "demo").sections
    assert [len(section.rows) for section in sections] == [1, 1, 1, 1]
    limited = [section for section in sections if "(limit=5)" in section.title]
    assert [section.limit for section in limited] == [5]
    assert "only a part" in table_notes(limited[0])[0]


def test_settings_tell_methods_apart(store):
    base = result()["settings"]
    store.add(*(result(settings=base | {"selector": {"p": p, "rule": "x"}}) for p in (0.3, 0.5)))
    store.add(result(selector="all", settings=base | {"selector": {"_target_": "all"}}))
    store.add(*(result("tail", selector=None, settings=base | {"selector": {"p": p}}) for p in (0.3, 0.5)))
    (section,) = Report.read(store, "demo").sections
    assert [row.label for row in section.rows] == [
        "short_lvlm (all)",
        "short_lvlm (tis, selector.p=0.3)",
        "short_lvlm (tis, selector.p=0.5)",
        "tail",  # used no selector, so its settings tell nothing apart
    ]


def test_rows_begin_with_what_was_left_alone_and_count_numbers(store):
    """ "none" says of what; steps=10 comes after steps=5, and 2e-5 before 1e-4."""
    base = result()["settings"]
    trained = [{"steps": 10, "lr": 1e-4}, {"steps": 5, "lr": 1e-4}, {"steps": 5, "lr": 2e-5}]
    for compensation in ("linear", "none"):
        store.add(result("tail", compensation=compensation, recovery="none"))
        settings = [base | {"recovery": options} for options in trained]
        store.add(*(result("tail", compensation=compensation, recovery="lora", settings=each) for each in settings))
    store.add(result("tail", compensation="linear", recovery="none", ratio=0.125))
    (section,) = Report.read(store, "demo").sections
    ways = [
        "recovery=none",
        "lora, recovery.lr=2e-05, recovery.steps=5",
        "lora, recovery.lr=0.0001, recovery.steps=5",
        "lora, recovery.lr=0.0001, recovery.steps=10",
    ]
    labels = [f"tail ({compensation}, {way})" for compensation in ("compensation=none", "linear") for way in ways]
    assert [row.label for row in section.rows] == [labels[4], *labels]
    assert section.labels == labels


def test_seeds_of_the_parts_count(store):
    base = result()["settings"]
    store.add(*(result("random", level=i / 10, settings=base | {"strategy": {"seed": i}}) for i in (3, 4, 5)))
    (section,) = Report.read(store, "demo").sections
    (row,) = section.rows
    assert len(row.runs) == 3
    assert (row.score(None).value, row.score(None).draws) == pytest.approx((0.4, 0.1 / 3**0.5))


def test_newest_of_equal_seeds_counts(store):
    store.add(result(level=0.1), result(level=0.6))
    (section,) = Report.read(store, "demo").sections
    assert [row.score(None).value for row in section.rows] == [0.6]
    assert any("1 older run" in note for note in table_notes(section))


def same_model(seed, level=0.6, keys=("k",), **other):
    """A run of a method that does not depend on its seed: one stored score for all seeds."""
    return result("tail", level=level, seed=seed, keys={"evaluate": list(keys), "compensate": ["c"]}, **other)


def test_seeds_that_change_nothing_are_one_run_with_the_error_of_its_samples(store):
    store.add(*(same_model(seed) for seed in range(3)))
    store.add(*(result("random", level=level, seed=seed) for seed, level in enumerate((0.3, 0.4, 0.5))))
    (section,) = Report.read(store, "demo").sections
    random, tail = sorted(section.rows, key=lambda row: row.label)
    assert (len(tail.runs), tail.seeds, tail.score(None)) == (1, 3, Estimate(0.6, 0.03))
    assert (len(random.runs), random.seeds) == (3, 3)
    (table,) = Report.read(store, "demo").tables
    assert [line.cells[0].text for line in table.lines] == ["dense", "random", "tail"]
    assert any(note.startswith("The seed changes nothing for tail:") for note in table.notes)


def test_equal_scores_of_different_layers_or_weights_are_different_runs(store):
    other = {"plan": result()["plan"] | {"removed": [1, 2]}}
    store.add(same_model(0), same_model(1, keys=("other",)), same_model(2, **other))
    (section,) = Report.read(store, "demo").sections
    assert [(len(row.runs), row.score(None).draws) for row in section.rows] == [(3, 0.0)]
    assert section.rows[0].score(None).error == pytest.approx(0.03)


def test_runs_left_out_are_called_older_only_if_they_are(store):
    """Two processes may finish in the same second."""
    with patch("time.strftime", return_value="2026-01-01T00:00:00+0000"):
        for number, level in enumerate((0.1, 0.6)):
            store.make("run", {"same": number}, lambda _, level=level: result(level=level))
    (section,) = Report.read(store, "demo").sections
    assert len(section.rows) == 1
    assert "Left out: 1 run(s) with the same method, ratio and seed as another one." in table_notes(section)


def test_age_counts_and_not_how_a_clock_writes_it(store):
    """12:00 in Tokyo is before 11:00 in London."""
    times = {0.6: "2026-01-01T11:00:00+0000", 0.1: "2026-01-01T12:00:00+0900"}
    for level, created in times.items():
        with patch("time.strftime", return_value=created):
            store.make("run", {"at": created}, lambda _, level=level: result(level=level))
    (section,) = Report.read(store, "demo").sections
    assert [row.score(None).value for row in section.rows] == [0.6]
    assert "Left out: 1 older run(s) with the same method, ratio and seed as another one." in table_notes(section)


# ------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("estimate", "interval", "bar"),
    [
        (Estimate(50.0, 10.0), (30.4, 69.6), (40.0, 60.0)),
        (Estimate(99.0, 2.0), (95.08, 100.0), (97.0, 100.0)),
        (Estimate(0.0, 1.0), (0.0, 1.96), (0.0, 1.0)),
        (Estimate(98.0, 1.0, 93.1, 99.4), (93.1, 99.4), (97.0, 99.0)),  # as the evaluation gave it
        (Estimate(50.0), None, (50.0, 50.0)),
    ],
)
def test_intervals_of_percentages_stay_within_them(estimate, interval, bar):
    found = estimate.interval((0.0, 100.0))
    assert found == (None if interval is None else pytest.approx(interval, rel=1e-4))
    assert estimate.bar(estimate.value, (0.0, 100.0)) == pytest.approx(bar)


def test_what_is_no_percentage_has_no_limits():
    assert Estimate(1.0, 1.0).interval(None) == pytest.approx((-0.959964, 2.959964))
    assert Estimate(0.1, 0.5).bar(0.1, None) == pytest.approx((-0.4, 0.6))


# ---------------------------------------------------------------------------------------------- clocks


def timed(strategy, device, rate=12.5, **other):
    """A run that answered the benchmarks on a device."""
    return result(strategy, cost=result()["cost"] | {"device": device, "samples_per_second": rate}, **other)


def test_speeds_of_other_devices_and_batch_sizes_are_not_shown(store):
    small = {"type": "cuda", "name": "T4", "batch_size": 1}
    large = {"type": "cuda", "name": "H100", "batch_size": 16}
    store.add(
        timed("a", small, 30.0), timed("b", large), timed("c", large, 15.0), timed("d", large | {"batch_size": 1})
    )
    (section,) = Report.read(store, "demo").sections
    assert {row.label: section.speed(row) for row in section.rows} == {"a": None, "b": 1.25, "c": 1.5, "d": None}
    notes = table_notes(section)
    assert any("cuda H100, batch size 16" in note for note in notes)
    assert (
        "Speed is left empty where it was measured under other conditions "
        "(cuda H100, batch size 1; cuda T4, batch size 1)." in notes
    )


def test_a_row_over_seeds_has_a_speed_only_of_one_clock(store):
    devices = [{"type": "cpu", "batch_size": size} for size in (1, 1, 2)]
    store.add(*(timed("random", device, seed=seed, level=0.1 * seed) for seed, device in enumerate(devices)))
    (section,) = Report.read(store, "demo").sections
    assert [section.speed(row) for row in section.rows] == [None]


def test_measured_answers_go_before_answering_the_benchmarks(store):
    measured = {"speedup": {"total": {"value": 1.4}}, "device": {"type": "cpu"}, "batch_size": 1}
    store.add(
        result("a", efficiency=measured), result("b", efficiency=measured | {"speedup": {"total": {"value": 2.0}}})
    )
    (section,) = Report.read(store, "demo").sections
    assert [section.speed(row) for row in section.rows] == [1.4, 2.0]
    store.add(result("c"))
    (section,) = Report.read(store, "demo").sections
    assert [section.speed(row) for row in section.rows] == [1.25] * 3  # not all of them were measured


def test_seeds_that_change_nothing_are_one_run(store):
    """Also where no score is stored that would show it."""
    store.add(*(result("tail", level=0.5, seed=seed, depends_on_seed=False) for seed in (0, 1, 2)))
    store.add(*(result("random", level=0.5, seed=seed, depends_on_seed=True) for seed in (0, 1, 2)))
    store.add(*(result("sleb", level=0.5 + seed / 10, seed=seed, depends_on_seed=False) for seed in (0, 1)))
    (section,) = Report.read(store, "demo").sections
    rows = {row.label: row for row in section.rows}
    assert {label: len(row.runs) for label, row in rows.items()} == {"random": 3, "sleb": 2, "tail": 1}
    assert rows["tail"].score(None).error == 0.03  # of its samples
    assert any("The seed changes nothing for tail: one run" in note for note in table_notes(section))


def test_what_else_may_have_changed_answers_is_said(store):
    note = "answered under different conditions: cuda (H100), batches of 8; cpu (vm), batches of 2"
    plain, noted = result("tail"), result("sleb")
    noted["scores"]["demo_yes"]["change"] = {"p": 0.5, "units_gained": 1, "units_lost": 2, "note": note}
    store.add(plain, noted)
    (section,) = Report.read(store, "demo").sections
    (said,) = [text for text in table_notes(section) if "rounding" in text]
    assert said == f"Caution: for sleb, the pruned and the dense model {note}; rounding alone may change answers."


def test_the_page_counts_units(store):
    both = result()
    both["scores"]["demo_yes"]["change"] = {"p": 0.06, "units_gained": 5, "units_lost": 0, "gained": 9, "lost": 4}
    store.add(both)
    report = Report.read(store, "demo")
    page = render_page("demo", report.sections, report.tables, [[]], store)
    assert "<td>0.06</td><td>5 / 0</td>" in page


# ------------------------------------------------------------------------------------------- evaluation


def test_runs_asked_in_another_way_are_a_table_of_their_own(store):
    """Neither replaces the other as an older one of the same settings."""
    plain, capped, styled, half = (result("tail", level=level) for level in (0.6, 0.5, 0.4, 0.3))
    caps = {"demo_yes": 2, "demo_no": 2}
    capped["settings"] = capped["settings"] | {"evaluation": {"max_new_tokens": caps, "frames": 4}}
    styled["settings"] = styled["settings"] | {"style": {"demo_yes": "qwen_vl"}}
    half["settings"] = half["settings"] | {"evaluation": {"max_new_tokens": {"demo_yes": 2}}}
    store.add(plain, capped, styled, half)
    sections = Report.read(store, "demo").sections
    assert [[row.score(None).value for row in section.rows] for section in sections] == [[0.6], [0.5], [0.3], [0.4]]
    assert not any(section.replaced for section in sections)
    assert [section.title for section in sections] == [
        "demo: tiny",
        "demo: tiny (max_new_tokens=2, frames=4)",
        'demo: tiny (max_new_tokens={"demo_yes": 2})',
        'demo: tiny (style={"demo_yes": "qwen_vl"})',
    ]
