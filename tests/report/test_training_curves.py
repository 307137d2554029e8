"""The curves of score against what recovery cost: which runs are in them, where they lie, how they are drawn."""

from helpers.results import result

from svl.report.figures.curves import Labels
from svl.report.figures.training import Cost, Panel, Training, accuracy_vs_training
from svl.report.results import read_runs
from svl.report.rows import compared_runs
from svl.report.training_curves import training_panels


def trained(level, steps=0, compensation="none", method="lora", seconds=None, **settings):
    """A run of `sleb` that was trained so long for a score."""
    body = result("sleb", level=level, compensation=compensation, recovery=method if steps else "none")
    if steps:
        budget = {"steps": None if seconds else steps, "budget_s": seconds, "data": "a.parquet", **settings}
        body["settings"]["recovery"] = budget
        body["training"] = {"steps": steps, "seconds": seconds or 7.5, "device": {"type": "cpu", "name": "A CPU"}}
    return body


def found(store, *results):
    store.add(*results)
    (section,) = compared_runs("demo", read_runs(store, "demo"))
    return training_panels(section)


def test_what_was_trained_alike_is_a_curve_from_its_start(store):
    """What has one budget only, such as another method or other data, is no curve."""
    panels = found(
        store,
        trained(0.3),
        trained(0.6, compensation="refit"),
        trained(0.7, 100, "refit"),
        trained(0.65, 20, "refit"),
        trained(0.4, 20),
        trained(0.5, 100),
        trained(0.1, 300, data="b.jsonl"),
        trained(0.2, 20, method="distill"),
    )
    assert panels.others == 2
    assert panels.unit == "steps of the optimiser"
    (heading,), (panel,) = panels.panels, panels.panels.values()
    assert heading == "25 % of the layers removed by sleb"
    assert {after: round(value) for after, value in panel.untrained.items()} == {"": 30, "refit": 60}
    figure = accuracy_vs_training(panels.panels, 80.0, panels.unit, Labels())
    (ax,) = figure.axes
    drawn = {
        (line.get_linestyle(), *zip(line.get_xdata(), map(round, line.get_ydata()), strict=True))
        for line in ax.get_lines()
        if len(line.get_xdata()) == 3 and line.get_linestyle() != "None"
    }
    assert drawn == {("--", (0, 30), (20, 40), (100, 50)), ("-", (0, 60), (20, 65), (100, 70))}
    assert {text.get_text() for text in ax.texts} - {""} == {
        "lora",
        "lora after refit",
        "no training",
        "refit, no training",
        "dense (none removed)",
    }


def test_what_has_no_average_is_in_no_curve(store):
    """Neither as the score without training, nor as the only point of a curve."""
    unknown = {"average": None, "retained": None}
    panels = found(
        store,
        trained(0.3) | unknown,
        trained(0.4, 20),
        trained(0.5, 100),
        trained(0.2, 20, method="distill") | unknown,
        trained(0.2, 100, method="distill") | unknown,
    )
    (panel,) = panels.panels.values()
    assert panel.untrained == {}
    assert [[round(point.value) for point in curve.points] for curve in panel.curves] == [[40, 50]]
    accuracy_vs_training(panels.panels, None, panels.unit, Labels())


def test_seconds_that_nearly_agree_have_one_number(store):
    curves = [
        Training("lora", after, (Cost(s, 1, 0, 2), Cost(5 * s, 2, 1, 3))) for s, after in ((60.2, ""), (60.9, "refit"))
    ]
    (ax,) = accuracy_vs_training({"x": Panel(curves, {})}, None, "seconds", Labels()).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "60", "301"]


def test_budgets_in_seconds_lie_where_training_ended(store):
    panels = found(store, trained(0.5, 11, seconds=60.0), trained(0.6, 50, seconds=300.0))
    assert panels.unit == "seconds of training (cpu A CPU)"
    (panel,) = panels.panels.values()
    (curve,) = panel.curves
    assert [point.spent for point in curve.points] == [60.0, 300.0]


def test_settings_that_tell_curves_apart_are_in_their_names(store):
    rates = [trained(0.5, steps, learning_rate=rate) for steps in (20, 100) for rate in (1e-3, 1e-4)]
    (panel,) = found(store, *rates).panels.values()
    labels = {curve.method for curve in panel.curves}
    assert labels == {"lora, recovery.learning_rate=0.001", "lora, recovery.learning_rate=0.0001"}


def test_without_several_budgets_there_is_no_figure(store):
    assert not found(store, trained(0.3), trained(0.5, 20)).panels
