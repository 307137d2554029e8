"""svl-report on synthetic stores: numbers worked out by hand, error lines, files, and what must not be imported."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from svl import figures, report
from svl.core import Plan, SvlError
from svl.report import Estimate, Report, main, merge
from svl.store import Store

LAYERS = 8


def result(strategy="short_lvlm", ratio=0.25, level=0.6, seed=0, **other):
    """The result of a run whose two benchmarks lie 0.1 above and below `level`; dense: 0.9 and 0.7."""
    n_remove = int(ratio * LAYERS + 0.5)
    removed = list(range(LAYERS - n_remove, LAYERS))
    scores = {
        f"demo_{task}": {
            "metric": "accuracy",
            "n": 100,
            "metrics": {
                "accuracy": {"value": level + shift, "stderr": 0.04, "dense": 0.8 + shift},
                "f1": {"value": None, "stderr": None, "dense": 0.5},
            },
        }
        for task, shift in (("yes", 0.1), ("no", -0.1))
    }
    body = {
        "name": "demo",
        "model": "tiny",
        "model_fingerprint": "f00",
        "strategy": strategy,
        "selector": "tis",
        "compensation": "none",
        "ratio": ratio,
        "n_remove": n_remove,
        "seed": seed,
        "limit": None,
        "plan": {
            "n_layers": LAYERS,
            "removed": removed,
            "kept": [],
            "importance": [0.1 * (i + 1) for i in range(LAYERS)],
        },
        "cost": {
            "params": 6_000_000,
            "params_dense": 8_000_000,
            "layers": LAYERS - n_remove,
            "layers_dense": LAYERS,
            "samples_per_second": 12.5,
            "samples_per_second_dense": 10.0,
        },
        "scores": scores,
        "average": {"value": level, "stderr": 0.03, "dense": 0.8},
        "retained": {"value": level / 0.8, "stderr": 0.04},
        "seconds": {"calibrate": 1.5, "plan": 0.1, "compensate": None, "evaluate": 3.0, "total": 4.6},
        "versions": {"svl": "0.1.0", "torch": "2.9"},
        "settings": {
            "strategy": {"_target_": "x", "seed": seed},
            "selector": {"_target_": "y", "p": 0.5},
            "compensation": {"_target_": "z"},
        },
    }
    return body | other


def example(folder: Path) -> None:
    """What a run with a token selector leaves in its folder."""
    Image.new("RGB", (16, 12), (90, 120, 200)).save(folder / "example.png")
    body = {
        "prompt": "Is it?",
        "grid": [3, 4],
        "visual": [i / 12 for i in range(12)],
        "visual_selected": [float(i > 8) for i in range(12)],
        "text": [["Is", 0.2, 1.0], ["Ġit", 0.1, 0.0], ["$?$", 0.3, 1.0]],
    }
    (folder / "example.json").write_text(json.dumps(body))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store; `store.add(result, ...)` adds finished runs, each a second younger than the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVL_STORE", str(tmp_path / "store"))
    made: Any = Store(tmp_path / "store")
    ages = iter(range(60))

    def add(*results, files=lambda folder: None):
        for body in results:
            age = next(ages)

            def build(folder, body=body):
                files(folder)
                return body

            manifest = made.make("run", {"number": age}, build).path / "manifest.json"
            dated = json.loads(manifest.read_text()) | {"created": f"2026-01-01T00:00:{age:02}+0000"}
            manifest.write_text(json.dumps(dated))

    made.add = add
    return made


def demo(store):
    """Two methods at two ratios, one of them with three seeds."""
    store.add(result(ratio=0.125, level=0.7), result(ratio=0.25, level=0.6), files=example)
    store.add(result("last_n", 0.125, 0.75), result("last_n", 0.25, 0.5, selector=None, compensation=None))
    store.add(*(result("random", 0.25, level, seed) for seed, level in enumerate((0.3, 0.4, 0.5))))


def test_merge():
    assert merge([Estimate(0.5, 0.1)]) == Estimate(0.5, 0.1)
    mean, spread = merge([Estimate(0.3, 9), Estimate(0.4, 9), Estimate(0.5, None)])
    assert mean == pytest.approx(0.4)
    assert spread == pytest.approx(0.1)  # sample standard deviation, not the runs' standard errors
    assert merge([Estimate(0.3), Estimate(None)]) == Estimate(None, None)


def test_table(store):
    demo(store)
    (section,) = Report.read(store, "demo").sections
    lines = section.markdown().splitlines()
    assert lines[:8] == [
        "| strategy | ratio | removed | yes % | no % | average % | retained % | params | speed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 0 % | 0 / 8 | 90.0 | 70.0 | 80.0 | 100.0 | 8 M | ×1.00 |",
        "| last_n (tis) | 12.5 % | 1 / 8 | 85.0 | 65.0 | **75.0 ± 3.0** | 93.8 | 6 M | ×1.25 |",
        "| short_lvlm | 12.5 % | 1 / 8 | 80.0 | 60.0 | 70.0 ± 3.0 | 87.5 | 6 M | ×1.25 |",
        "| last_n (none) | 25 % | 2 / 8 | 60.0 | 40.0 | 50.0 ± 3.0 | 62.5 | 6 M | ×1.25 |",
        "| random (3 seeds) | 25 % | 2 / 8 | 50.0 | 30.0 | 40.0 ± 10.0 | 50.0 | 6 M | ×1.25 |",
        "| short_lvlm | 25 % | 2 / 8 | 70.0 | 50.0 | **60.0 ± 3.0** | 75.0 | 6 M | ×1.25 |",
    ]
    assert "demo_yes (accuracy, n = 100), demo_no" in lines[9]


def test_terminal_shows_every_number(store):
    demo(store)
    out = io.StringIO()
    Report.read(store, "demo").show(Console(file=out, width=40, force_terminal=True))
    assert "…" not in out.getvalue()
    bold = re.findall(r"\x1b\[1m *([\d.]+ ± [\d.]+)", out.getvalue())
    assert bold == ["75.0 ± 3.0", "60.0 ± 3.0"]  # the best of each ratio


def test_unlike_runs_are_in_different_tables(store):
    store.add(result(), result(limit=5), result(model="other", model_fingerprint="ba5"))
    scored = result()["scores"]
    store.add(result(scores={"demo_yes": scored["demo_yes"]}))
    sections = Report.read(store, "demo").sections
    assert [len(section.rows) for section in sections] == [1, 1, 1, 1]
    limited = [section for section in sections if "(limit=5)" in section.title]
    assert [section.runs[0]["limit"] for section in limited] == [5]
    assert "only a part" in limited[0].notes()[0]


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


def test_seeds_of_the_parts_count(store):
    base = result()["settings"]
    store.add(*(result("random", level=i / 10, settings=base | {"strategy": {"seed": i}}) for i in (3, 4, 5)))
    (section,) = Report.read(store, "demo").sections
    (row,) = section.rows
    assert len(row.runs) == 3
    assert row.score(None) == pytest.approx((0.4, 0.1))


def test_runs_without_benchmarks(store, capsys):
    store.add(result(scores={}, average=None, retained=None, cost={"layers": 6, "layers_dense": 8}))
    assert main(["experiment=demo"]) == 0
    assert "Benchmarks: none." in capsys.readouterr().out
    assert not Path("outputs/report/demo/accuracy_vs_ratio.png").exists()
    assert Path("outputs/report/demo/importance.png").exists()


def test_newest_of_equal_seeds_counts(store):
    store.add(result(level=0.1), result(level=0.6))
    (section,) = Report.read(store, "demo").sections
    assert [row.score(None).value for row in section.rows] == [0.6]
    assert any("1 older run" in note for note in section.notes())


def test_missing_and_large_values(store):
    scores = result()["scores"]
    for value, score in zip((1200.5, 300.0), scores.values(), strict=True):
        score["metrics"]["accuracy"] = {"value": value, "stderr": None, "dense": 1500.0}
    empty = {"value": None, "stderr": None}
    cost = result()["cost"] | {"samples_per_second": None}
    store.add(result(scores=scores, average=empty | {"dense": None}, retained=empty, cost=cost))
    (section,) = Report.read(store, "demo").sections
    header, table, best = section.cells()
    assert header[3:6] == ["yes", "no", "average %"]
    assert table[1][3:] == ["1200.5", "300.0", "–", "–", "6 M", "–"]
    assert not best
    assert main(["experiment=demo"]) == 0


def test_files(store, capsys):
    demo(store)
    assert main(["experiment=demo"]) == 0
    out = Path("outputs/report/demo")
    names = {"accuracy_vs_ratio", "importance", "token_importance-tis"}
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {p.name for p in out.iterdir()} == {"report.md", "table.md", "results.csv"} | pictures
    for name in names:
        with Image.open(out / f"{name}.png") as image:
            assert image.width == figures.WIDTH * figures.DPI
            assert len(set(image.convert("L").tobytes())) > 10  # something is drawn
    text = (out / "report.md").read_text()
    assert all(f"({name}.png)" in text for name in names)
    assert "| random | tis | none | 25 % | 2 | 6, 7 |" in text
    assert (out / "table.md").read_text().strip() in text
    assert "outputs/report/demo/report.md" in capsys.readouterr().out


def test_csv(store):
    demo(store)
    assert main(["experiment=demo", "out=there"]) == 0
    rows = list(csv.DictReader(io.StringIO(Path("there/results.csv").read_text())))
    per_run = 2 * 2 + 2 + 3 + 5  # benchmarks x metrics, average and retained, cost, seconds
    assert len(rows) == 7 * per_run
    assert len({(row["run"], row["group"], row["task"], row["metric"]) for row in rows}) == len(rows)
    (one,) = (
        row
        for row in rows
        if (row["strategy"], row["seed"], row["task"], row["metric"]) == ("random", "2", "demo_yes", "accuracy")
    )
    assert [float(one[key]) for key in ("value", "stderr", "dense", "n", "main")] == [0.6, 0.04, 0.9, 100, 1]
    assert one["removed"] == "6 7"
    (speed,) = {(r["value"], r["dense"]) for r in rows if (r["group"], r["metric"]) == ("cost", "samples_per_second")}
    assert speed == ("12.5", "10.0")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["experiment=dmo"], "did you mean 'demo'?"),
        ([], "which experiment? Say experiment=NAME"),
        (["expermient=demo"], "did you mean 'experiment'?"),
        (["demo"], "'demo' is not understood"),
        (["experiment=demo", "store=nowhere"], "no finished run in the store"),
        (["experiment=demo", "out=file/there"], "cannot write the report to file/there"),
    ],
)
def test_mistakes_are_one_line(store, capsys, words, line):
    demo(store)
    Path("file").touch()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_two_checkpoints_of_one_name(store, capsys):
    store.add(result(), result(model_fingerprint="bad"))
    assert main(["experiment=demo"]) == 1
    assert "2 different checkpoints called 'tiny' (fingerprints bad, f00)" in capsys.readouterr().err


def test_runs_of_another_version(store, capsys):
    old = result()
    del old["versions"]
    store.add(old)
    assert main(["experiment=demo"]) == 1
    out, error = capsys.readouterr()
    assert not out
    assert "another version of svl (problem: 'versions')" in error


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "SVL_STORE" in capsys.readouterr().out


def test_wandb_sync(store, tmp_path):
    places = [tmp_path / f"runs/{i}/wandb/offline-run-2026_0-{i}" for i in range(5)]
    for place in places[:2]:
        place.mkdir(parents=True)
    store.add(*(result(seed=i) for i in range(6)), result(name="other"))
    for entry, place in zip(store.entries("run"), [*places, "https://wandb/run", tmp_path], strict=True):
        store.make("track", {"run": entry.key}, lambda _, e=entry, p=place: {"run": e.key, "location": str(p)})
    made = Report.read(store, "demo")
    few = "wandb sync runs/0/wandb/offline-run-2026_0-0 runs/1/wandb/offline-run-2026_0-1"
    assert made.wandb_sync() == few  # the others are not there (any more)
    for place in places[2:]:
        place.mkdir(parents=True)
    assert made.wandb_sync() == "wandb sync runs/*/wandb/offline-run-*"
    (tmp_path / "runs/other/wandb/offline-run-1").mkdir(parents=True)
    assert str(made.wandb_sync()).count("offline-run-2026") == 5  # a pattern would upload a stranger


def test_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "report.md"
    target.write_text("old")
    code = (
        "import os, sys, pathlib; from svl.report import whole\n"
        "with whole(pathlib.Path(sys.argv[1])) as path:\n    path.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, target], check=False).returncode == 9
    assert target.read_text() == "old"


def test_failing_writer_leaves_the_old_files(store, monkeypatch, capsys):
    demo(store)
    assert main(["experiment=demo", "out=out"]) == 0
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    store.add(result("sleb"))

    def full(source, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(report.os, "replace", full)
    assert main(["experiment=demo", "out=out"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


def test_imports_nothing_heavy(store):
    demo(store)
    code = (
        "import sys; import svl.report, svl.trackers.wandb\n"
        "heavy = {'torch', 'transformers', 'wandb', 'lmms_eval', 'matplotlib.pyplot'}\n"
        "assert not (heavy | {'matplotlib'}) & set(sys.modules), 'on import'\n"
        "assert svl.report.main(['experiment=demo']) == 0\n"
        "assert not heavy & set(sys.modules), 'for a report'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------- figures


def pixels(figure, path):
    """The figure as an image's bytes."""
    with Image.open(figures.save(figure, path)) as image:
        assert image.width == figures.WIDTH * figures.DPI
        return image.tobytes()


def test_accuracy_figure_shows_its_data(tmp_path):
    def draw(last, error=1.0, dense=90.0):
        curves = {"a_$b": [(0.2, 70.0, 1.0), (0.4, last, error)], "empty": []}
        return pixels(figures.accuracy_vs_ratio(curves, dense), tmp_path / "x.png")

    assert draw(50.0) == draw(50.0)
    assert len({draw(50.0), draw(60.0), draw(50.0, error=4.0), draw(50.0, error=None), draw(50.0, dense=None)}) == 5


def test_importance_figure_shows_its_data(tmp_path):
    def draw(*removed, importance=(0.1, 0.2, 0.3)):
        return pixels(figures.importance({"a": {0.3: Plan(3, removed, importance)}}), tmp_path / "x.png")

    assert draw(0) == draw(0)
    assert len({draw(0), draw(1), draw(), draw(0, importance=(0.1, 0.3, 0.2)), draw(0, importance=())}) == 5
    draw(0, importance=(0.001, 0.5, 1.0))  # logarithmic
    with pytest.raises(SvlError, match="plans of one model"):
        figures.importance({"a": {0.1: Plan(3, (0,)), 0.2: Plan(4, (0,))}})


def test_token_figure_shows_its_data(tmp_path):
    image = Image.new("RGB", (20, 10), "white")

    def draw(**other):
        text = [["<s>", 0.5, 1.0], ["▁dog", 0.1, 0.0], ["日本", 0.2, 0.5]] * 40  # more than fit
        body = {"grid": [1, 2], "visual": [0.1, 0.2], "visual_selected": [1, 0], "text": text}
        return pixels(figures.token_importance(image, body | other), tmp_path / "x.png")

    assert draw() == draw()
    variants = [
        draw(),
        draw(visual=[0.2, 0.1]),
        draw(visual_selected=[0, 1]),
        draw(text=[["a", 0.1, 1.0]]),
        draw(text=[]),
    ]
    assert len(set(variants)) == 5
    with pytest.raises(SvlError, match="1 values of 'visual' for a grid of 1 x 2"):
        draw(visual=[0.1])
