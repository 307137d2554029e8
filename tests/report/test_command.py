"""svl-report on synthetic stores: files, lines of errors, and what must not be imported."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from helpers.races import another_process
from helpers.results import demo, example, result
from markdown_it import MarkdownIt
from PIL import Image

from svl.report import main
from svl.report.experiment_report import Report
from svl.report.figures import style
from svl.store.files import whole_file


def test_runs_without_benchmarks(store, capsys):
    store.add(result(scores={}, average=None, retained=None, cost={"layers": 6, "layers_dense": 8}))
    assert main(["experiment=demo"]) == 0
    assert "Benchmarks: none." in capsys.readouterr().out
    assert not Path("outputs/report/demo/accuracy_vs_ratio.png").exists()
    assert Path("outputs/report/demo/importance.png").exists()


def test_files(store, capsys):
    demo(store)
    assert main(["experiment=demo"]) == 0
    out = Path("outputs/report/demo")
    names = {"accuracy_vs_ratio", "importance", "removed_layers", "token_importance-tis"}
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    texts = {"report.html", "report.md", "table.md", "table.tex", "table.csv", "results.csv"}
    assert {p.name for p in out.iterdir()} == texts | pictures
    for name in names:
        with Image.open(out / f"{name}.png") as image:
            assert image.width == style.WIDTH * style.DPI
            assert len(set(image.convert("L").tobytes())) > 10  # something is drawn
    text = (out / "report.md").read_text()
    assert all(f"({name}.png)" in text for name in names)
    assert re.search(r"\| random +\| tis +\| none +\| +25 % \| +2 \| 6, 7 +\|", text)
    assert (out / "table.md").read_text().strip() in text
    assert "outputs/report/demo/report.md" in capsys.readouterr().out


def test_build_is_the_plain_command(store, no_figures, capsys):
    demo(store)
    for words, out in ((["build", "experiment=demo"], "a"), (["experiment=demo"], "b")):
        assert main([*words, f"out={out}"]) == 0
    files = [{p.name: p.read_text() for p in Path(out).iterdir()} for out in "ab"]
    assert files[0] == files[1]


def test_csv_says_what_a_run_was_calibrated_on(store, no_figures):
    data = {"file": "questions.parquet", "samples": 64, "seed": 2}
    store.add(result(settings=result()["settings"] | {"calibration": data}), result("tail", level=0.2))
    assert main(["experiment=demo", "out=there"]) == 0
    rows = list(csv.DictReader(io.StringIO(Path("there/results.csv").read_text())))
    found = {row["strategy"]: [row[f"calibration_{name}"] for name in data] for row in rows}
    assert sorted(found.values()) == [["", "", ""], ["questions.parquet", "64", "2"]]


def test_csv_says_what_a_run_was_trained_on(store, no_figures):
    device = {"type": "cuda", "name": "H100", "batch_size": 8, "processes": 2}
    budget = {"samples": 12, "tokens": 340, "steps": 7, "seconds": 5.0, "shared_pictures": None, "device": device}
    store.add(result("tail"), result("sleb", level=0.2, recovery="lora", training=budget))
    assert main(["experiment=demo", "out=there"]) == 0
    rows = list(csv.DictReader(io.StringIO(Path("there/results.csv").read_text())))
    assert {(row["strategy"], row["trained_on"]) for row in rows} == {("tail", ""), ("sleb", "cuda H100, 2 processes")}


def test_csv(store, no_figures):
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
        ([], "which experiment? Give experiment=NAME"),
        (["expermient=demo"], "did you mean 'experiment'?"),
        (["demo"], "'demo' is not understood; use experiment=NAME"),
        (["bild", "experiment=demo"], "did you mean 'build'?"),
        (["build", "demo"], "unrecognized arguments: demo; see svl-report --help"),
        (["compare", "aaaa"], "required: RUN; see svl-report compare --help"),
        (["experiment=demo", "store=nowhere"], "there is no store"),
        (["experiment=demo", "store=."], "did you mean store="),
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


def test_a_run_of_another_version_is_named_and_left_out(store, capsys, caplog):
    old, odd = result(seed=1), result(seed=2, scores={"demo_yes": {"metric": "accuracy", "n": 9, "metrics": {}}})
    del old["versions"]
    store.add(old, odd)
    first, second = (entry.key for entry in store.entries("run"))
    assert main(["experiment=demo"]) == 1
    out, error = capsys.readouterr()
    assert not out
    assert "they are of another version of svl: the scores of 'demo_yes' lack the main metric" in error
    store.add(result(level=0.5))
    caplog.clear()
    (section,) = Report.read(store, "demo").sections
    assert [row.score(None).value for row in section.rows] == [0.5]
    assert [message.split(" (damaged")[0] for message in caplog.messages] == [
        f"run {first} is left out: 'versions' is missing",
        f"run {second} is left out: the scores of 'demo_yes' lack the main metric",
    ]


def test_damaged_manifests_do_not_break_other_experiments(store, caplog):
    store.add(result(name="other"), result(name="third"), result())
    other, third, ours = store.entries("run")
    (other.path / "manifest.json").write_text('{"stage": "run", "created": 3, "output": {"name": "demo"}}')
    (third.path / "manifest.json").write_bytes(b"\x1b[31m\xff")
    report = Report.read(store, "demo")
    assert [run.key for run in report.runs] == [ours.key]
    assert other.key in caplog.text
    assert third.key in caplog.text


@pytest.mark.parametrize("words", [["--help"], ["help"], ["gc", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "what no run refers to" in shown if "gc" in words else "compare 18e4 c0a4" in shown


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


def test_folders_of_wandb_cannot_break_out_of_the_report(store, tmp_path, no_figures):
    """Their names are shown as code; what a terminal would obey is not shown at all."""
    store.add(result(seed=0), result(seed=1))
    names = ("a\n```\n# heading", "``` b ````")
    for run, name in zip(store.entries("run"), names, strict=True):
        place = tmp_path / name
        place.mkdir()
        store.make("track", {"run": run.key}, lambda _, r=run, p=place: {"run": r.key, "location": str(p)})
    assert main(["experiment=demo", "out=out"]) == 0
    tokens = MarkdownIt("commonmark").enable("table").parse(Path("out/report.md").read_text())
    assert [token.content for token in tokens if token.type == "fence"] == ["wandb sync '``` b ````'\n"]
    assert "heading" not in [token.content for token in tokens]


def test_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "report.md"
    target.write_text("old")

    def write(told: Connection) -> None:
        with whole_file(target) as path:
            path.write_text("half")
            os._exit(9)

    with another_process(write) as (process, _):
        process.join()
        assert process.exitcode == 9
    assert target.read_text() == "old"


def test_failing_writer_leaves_the_old_files(store, monkeypatch, capsys):
    demo(store)
    assert main(["experiment=demo", "out=out"]) == 0
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    store.add(result("sleb"))

    def full(source, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
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


def test_no_picture_of_a_constant(store):
    """A selector that prefers no token, importance that tells no layers apart, plans that remove none."""

    def flat(folder):
        example(folder)
        body = json.loads((folder / "example.json").read_text())
        body |= {"visual": [1.0] * 12, "visual_selected": [1.0] * 12, "text": [["a", 1.0, 1.0], ["b", 1.0, 1.0]]}
        (folder / "example.json").write_text(json.dumps(body))

    plan = {"n_layers": 8, "removed": [], "kept": list(range(8)), "importance": [1.0] * 8}
    store.add(result("identity", ratio=0.0, n_remove=0, plan=plan), files=flat)
    assert main(["experiment=demo"]) == 0
    assert [p.name for p in Path("outputs/report/demo").glob("*.png")] == ["accuracy_vs_ratio.png"]
