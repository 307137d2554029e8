"""svl-report on synthetic stores: numbers worked out by hand, error lines, files, and what must not be imported."""

import base64
import csv
import html.parser
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from svl import figures
from svl.core import Plan, SvlError
from svl.report import files, main, page, paper, pictures, tables
from svl.report.build import Report
from svl.report.rows import Estimate, merge
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


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without figures, which take most of the time."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])


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
    (table,) = Report.read(store, "demo").tables
    lines = tables.markdown(table).splitlines()
    assert lines[:8] == [
        "| strategy | ratio | removed | yes % | no % | average % | retained % | params | speed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 0 % | 0 / 8 | 90.0 | 70.0 | 80.0 | 100.0 | 8 M | ×1.00 |",
        "| last_n (tis) | 12.5 % | 1 / 8 | **85.0** | **65.0** | **75.0 ± 3.0** | **93.8** | 6 M | ×1.25 |",
        "| short_lvlm | 12.5 % | 1 / 8 | 80.0 | 60.0 | 70.0 ± 3.0 | 87.5 | 6 M | ×1.25 |",
        "| last_n (none) | 25 % | 2 / 8 | 60.0 | 40.0 | 50.0 ± 3.0 | 62.5 | 6 M | ×1.25 |",
        "| random (3 seeds) | 25 % | 2 / 8 | 50.0 | 30.0 | 40.0 ± 10.0 | 50.0 | 6 M | ×1.25 |",
        "| short_lvlm | 25 % | 2 / 8 | **70.0** | **50.0** | **60.0 ± 3.0** | **75.0** | 6 M | ×1.25 |",
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
    (table,) = Report.read(store, "demo").tables
    assert [column.head for column in table.columns[3:6]] == ["yes", "no", "average %"]
    assert [cell.text for cell in table.lines[1][3:]] == ["1200.5", "300.0", "–", "–", "6 M", "–"]
    assert not any(cell.best for line in table.lines for cell in line)
    assert main(["experiment=demo"]) == 0


def test_files(store, capsys):
    demo(store)
    assert main(["experiment=demo"]) == 0
    out = Path("outputs/report/demo")
    names = {"accuracy_vs_ratio", "accuracy_vs_speed", "importance", "removed_layers", "token_importance-tis"}
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    texts = {"report.html", "report.md", "table.md", "table.tex", "table.csv", "results.csv"}
    assert {p.name for p in out.iterdir()} == texts | pictures
    for name in names:
        with Image.open(out / f"{name}.png") as image:
            assert image.width == figures.WIDTH * figures.DPI
            assert len(set(image.convert("L").tobytes())) > 10  # something is drawn
    text = (out / "report.md").read_text()
    assert all(f"({name}.png)" in text for name in names)
    assert "| random | tis | none | 25 % | 2 | 6, 7 |" in text
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


def test_table_csv(store):
    demo(store)
    (table,) = Report.read(store, "demo").tables
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(table))))
    assert [row["strategy"] for row in rows][:3] == ["dense", "last_n (tis)", "short_lvlm"]
    first = {key: rows[1][f"measured: {key}"] for key in ("yes %", "yes error", "average %", "average error", "params")}
    assert first == {
        "yes %": "85", "yes error": "4", "average %": "75", "average error": "3", "params": "6000000",
    }  # fmt: skip


def latex_builds(folder: Path, text: str) -> str:
    """Compile a document around `text`; its log."""
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine (Debian: texlive-latex-recommended)")
    document = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n%s\n\\end{document}\n"
    (folder / "x.tex").write_text(document % text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (folder / "x.pdf").stat().st_size > 10_000
    return done.stdout


def test_latex_compiles(store, tmp_path):
    strange = {"selector": {"p": "50 % & {x} ~^ #1 $y$ \\z <a>"}}
    store.add(result(), result(settings=result()["settings"] | strange), result("tail", level=0.2))
    store.add(*paper_runs())
    text = tables.latex(Report.read(store, "demo").tables)
    log = latex_builds(tmp_path, text)
    assert "Overfull" not in log
    assert r"\textbf{60.0}\,{\scriptsize$\pm$\,3.0}" in text
    assert r"\cmidrule(lr){4-13}\cmidrule(lr){14-20}" in text
    assert r"\multicolumn{7}{c}{paper}" in text


# ------------------------------------------------------------------------------------------ the paper's numbers


def paper_runs():
    """LLaVA-1.5-7B on the paper's six benchmarks: its method, the same without compensation, and another."""
    tasks = ("aokvqa", "scienceqa", "mme", "pope", "mmbench", "seedbench")
    scores = {
        f"svl_{task}": {
            "metric": "accuracy",
            "n": 100,
            "metrics": {"accuracy": {"value": 1300.0 if task == "mme" else 0.5, "stderr": 0.01, "dense": 0.6}},
        }
        for task in tasks
    }
    body: dict[str, Any] = {"model": "llava-1.5-7b-hf", "scores": scores, "ratio": 0.2}
    ours = {"compensation": "subspace"}
    return result(**body, **ours), result(**body), result("tail", **body, **ours, seed=1)


def test_paper_columns_are_apart(store):
    store.add(*paper_runs())
    (table,) = Report.read(store, "demo").tables
    heads = [column.head for column in table.columns if column.group == "paper"]
    names = ["aokvqa", "scienceqa", "mme", "pope", "mmbench", "seedbench", "average"]
    assert heads == [f"paper: {name} %".replace("mme %", "mme") for name in names]
    lines = {line[0].text: [cell.text for cell in line[-7:]] for line in table.lines}
    assert lines["dense"] == ["77.9", "65.6", "1246.4", "84.8", "64.3", "65.4", "70.1"]
    assert lines["short_lvlm (subspace)"] == ["77.8", "64.7", "1202.9", "84.6", "64.3", "64.6", "69.4"]
    assert set(lines["short_lvlm (none)"] + lines["tail"]) == {"–"}  # the paper has no such rows
    assert any("not measured here" in note for note in table.notes)
    assert "paper: pope %" in tables.comma_separated(table)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llava-1.5-7b-hf", "LLaVA-1.5-7B"),
        ("liuhaotian/llava-v1.5-13b", "LLaVA-1.5-13B"),
        ("Qwen-VL-Chat", "Qwen-VL-Chat-7B"),
        ("mplug-owl2-llama2-7b", "mPLUG-Owl2-7B"),
        ("llava-v1.6-vicuna-7b-hf", None),
        ("Qwen2.5-VL-7B-Instruct", None),
        ("llava-1.5-34b", None),
        ("demo_lvlm", None),
        ("7b", None),
    ],
)
def test_models_of_the_paper(model, name):
    found = paper.numbers(model)
    assert (found and found.model) == name


def test_few_benchmarks_have_no_paper_average():
    found = paper.numbers("llava-1.5-7b-hf")
    assert found
    assert found.value(None, "svl_pope", ["svl_pope"]) == 84.8
    assert found.value(None, None, ["svl_pope"]) is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["experiment=dmo"], "did you mean 'demo'?"),
        ([], "which experiment? Say experiment=NAME"),
        (["expermient=demo"], "did you mean 'experiment'?"),
        (["demo"], "'demo' is not understood; use experiment=NAME"),
        (["bild", "experiment=demo"], "did you mean 'build'?"),
        (["build", "demo"], "use svl-report build experiment=NAME"),
        (["compare", "aaaa"], "compare needs 2 names: svl-report compare A B"),
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
        "import os, sys, pathlib; from svl.report.files import whole\n"
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

    monkeypatch.setattr(files.os, "replace", full)
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


# ------------------------------------------------------------------------------------------------- page


def answers(store, right, removed=(), n=20, **inputs):
    """Key of a score: questions 0 to n - 1, of which `right` are answered right, the others wrong, with an image."""
    inputs = {"task": "t", "removed": list(removed), "right": sorted(right), "benchmark": "b", **inputs}

    def build(folder):
        rows, images = [], {}
        for i in range(n):
            score = float(i in right)
            answer = "yes" if score else f"</script><b>no {i}\u2028"
            row = {"doc_id": i, "question": f"Is {i} < 3?", "target": "yes", "prediction": answer, "score": score}
            rows.append(json.dumps(row, ensure_ascii=False))
            if not score:
                file = io.BytesIO()
                Image.new("RGB", (32, 24), (10 * i, 120, 200)).save(file, "WEBP")
                images[i] = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        (folder / "samples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / "thumbnails.json").write_text(json.dumps(images))
        return {"task": "t", "metric": "accuracy", "n": n, "limit": None}

    return store.make("score", inputs, build).key


def scored(store):
    """Three methods with stored answers: the dense model is right on 0 to 15, the first one on 4 to 17."""
    dense = answers(store, range(16))
    for strategy, right, level in (("short_lvlm", range(4, 18), 0.7), ("tail", range(6), 0.3), ("sleb", (), 0.1)):
        value = {"value": len(right) / 20, "stderr": 0.1, "dense": 0.8}
        scores = {"t": {"metric": "accuracy", "n": 20, "metrics": {"accuracy": value}}}
        n = {"tail": 3}.get(strategy, 2)
        plan = {"n_layers": LAYERS, "removed": list(range(LAYERS - n, LAYERS)), "kept": [], "importance": None}
        keys = {"evaluate": [answers(store, right, plan["removed"])], "dense": [dense]}
        store.add(result(strategy, level=level, scores=scores, keys=keys, plan=plan))


class Elements(html.parser.HTMLParser):
    """All start tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


def test_page_holds_everything(store):
    scored(store)
    assert main(["experiment=demo", "out=out"]) == 0
    text = Path("out/report.html").read_text(encoding="utf-8")
    report = Report.read(store, "demo")
    found = Elements(text)
    for tag, attributes in found.tags:  # nothing is fetched
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "base")
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    drawn = [a["src"] for t, a in found.tags if t == "img" and "src" in a]
    assert len(drawn) == len(list(Path("out").glob("*.png"))) == 3
    assert base64.b64decode(drawn[0].partition(",")[2]) == Path("out/accuracy_vs_ratio.png").read_bytes()

    images = json.loads(next(script for script in found.scripts if script.startswith("{")))
    shown = {a["data-image"] for t, a in found.tags if t == "img" and "data-image" in a}
    assert shown == set(images)
    dense = report.entries[0].output["keys"]["dense"][0]
    first_lost = {*range(4), *range(6, 14), *range(8)}  # by each of the three, 8 at most
    assert shown == {f"{dense}/{i}" for i in first_lost | {16, 17}}  # the last two are gained
    cells = [float(a["data-value"]) for t, a in found.tags if t == "td" and a.get("class") == "measured"]
    values = [cell.value for line in report.tables[0].lines for cell in line[3:]]
    assert cells == pytest.approx(values)
    assert "t: 4 lost, 2 gained" in text
    assert "t: 10 lost, 0 gained" in text
    assert "… and 2 more lost." in text
    assert "&lt;/script&gt;&lt;b&gt;no 0" in text  # text stays text
    assert "layer 7: removed" in text
    assert text.count('class="gone"') == 2 + 3 + 2


def test_page_without_scores(store, no_figures):
    store.add(result(keys={"evaluate": ["gone"], "dense": ["gone"]}))
    assert main(["experiment=demo", "out=out"]) == 0
    assert "None are stored." in Path("out/report.html").read_text()


@pytest.fixture
def chromium():
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_page_in_a_browser(store, chromium, width, mobile):
    scored(store)
    report = Report.read(store, "demo")
    Path("report.html").write_text(
        page.render("demo", report.sections, report.tables, [[]], report.entries, store), encoding="utf-8"
    )
    context = chromium.new_context(viewport={"width": width, "height": 800}, is_mobile=mobile, has_touch=mobile)
    tab = context.new_page()
    noise, requests = [], []
    tab.on("console", lambda message: noise.append(message.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    tab.goto(Path("report.html").absolute().as_uri())

    def names():
        return [row.locator("td").first.inner_text() for row in tab.locator("tr.row:visible").all()]

    assert names() == ["short_lvlm", "sleb", "tail"]
    head = tab.locator("thead button", has_text="average")
    for order in (["short_lvlm", "tail", "sleb"], ["sleb", "tail", "short_lvlm"], ["short_lvlm", "sleb", "tail"]):
        head.click()
        assert names() == order
    tab.locator(".chip", has_text="tail").click()
    assert names() == ["tail"]
    assert tab.locator(".tools span").inner_text() == "1 of 3 rows"
    tab.locator(".chip", has_text="all").click()

    before = tab.screenshot(full_page=True)
    row, detail = tab.locator("tr.row").first, tab.locator("tr.detail").first
    assert not detail.is_visible()
    row.click()
    assert detail.is_visible()
    assert detail.locator(".plan li.gone").count() == 2
    images = detail.locator("img")
    assert images.count() == 6
    assert images.evaluate_all("all => all.map(image => image.naturalWidth)") == [32] * 6
    assert detail.locator(".cards li").first.bounding_box()["width"] < width
    assert detail.locator(":scope > td > div").bounding_box()["width"] <= width  # beside a table that may be wider
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
    after = tab.screenshot(full_page=True)
    with Image.open(io.BytesIO(before)) as short, Image.open(io.BytesIO(after)) as long:
        assert long.height > short.height + 200
    row.press("Enter")
    assert not detail.is_visible()
    assert not noise
    assert set(requests) <= {"file", "data"}


# ------------------------------------------------------------------------------------------- comparison


def test_compare(store, capsys, tmp_path):
    scored(store)
    first, second, _ = store.entries("run")
    assert main(["--compare", first.key[:9], second.key, "out=page.md"]) == 0
    text = capsys.readouterr().out
    assert Path("page.md").read_text() == text.removesuffix("\n")
    assert "| strategy | short_lvlm | tail |" in text
    assert "| selector |" not in text  # the same in both
    assert "only A: none; only B: 5; both: 6, 7." in text
    assert "A  ......##\nB  .....###" in text
    # right: A on 4 to 17, B on 0 to 5; only A: 6 to 17, only B: 0 to 3
    difference = statistics.stdev([-1.0] * 4 + [0.0] * 2 + [1.0] * 12 + [0.0] * 2) / 20**0.5
    line = next(line for line in text.splitlines() if line.startswith("| t |"))
    assert f"| 70.0 | 30.0 | +40.0 ± {100 * difference:.1f} |" in line
    p = 2 * sum(math.comb(16, k) for k in range(5)) / 2**16
    assert line.endswith(f"| 12 | 4 | {p:.2g} |")
    assert len(re.findall(r"^\| \d+ \| Is ", text, re.MULTILINE)) == 16
    assert "#### Right only in B" in text

    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(first.output))
    assert main(["compare", str(folder), second.key]) == 0
    assert capsys.readouterr().out == text


def test_compare_says_what_cannot_be_compared(store, capsys):
    runs = [answers(store, range(5), benchmark=name) for name in ("one", "two")]
    scores = {"t": {"metric": "accuracy", "n": 20, "metrics": {"accuracy": {"value": 0.2, "stderr": 0, "dense": 1.0}}}}
    store.add(*(result(scores=scores, keys={"evaluate": [key], "dense": []}) for key in (*runs, "gone")))
    first, second, third = (entry.key for entry in store.entries("run"))
    assert main(["compare", first, second]) == 0
    assert "cannot be compared question by question: the benchmark's files differ" in capsys.readouterr().out
    assert main(["compare", first, third]) == 0
    assert "so without pairs: scores gone." in capsys.readouterr().out
    wrong = first[:-1] + ("0" if first[-1] != "0" else "1")
    assert main(["compare", wrong, second]) == 1
    assert f"did you mean '{first}'?" in capsys.readouterr().err


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


def test_speed_figure_shows_its_data(tmp_path):
    def draw(speed, ratio=0.4, dense=90.0):
        curves = {"a": [(1.1, 80.0, 1.0, 0.2), (speed, 60.0, None, ratio)], "empty": []}
        return pixels(figures.accuracy_vs_speed(curves, dense), tmp_path / "x.png")

    assert len({draw(1.3), draw(1.4), draw(1.3, ratio=0.3), draw(1.3, dense=None)}) == 4


def test_pareto():
    points = [(1.0, 90.0), (1.2, 80.0), (1.1, 79.0), (1.5, 60.0), (1.5, 55.0), (0.9, 90.0), (1.2, 80.0)]
    beaten = {p for p in points for q in points if q != p and q[0] >= p[0] and q[1] >= p[1]}
    assert figures.pareto(points) == sorted(set(points) - beaten)


def test_maps_show_their_data(tmp_path):
    def ranks(*removed, importance=(0.1, 0.2, 0.3)):
        plans = {"a": Plan(3, removed, importance), "b" * 60: Plan(3, (1,), (3, 2, 1))}
        return pixels(figures.importance_map(plans), tmp_path / "x.png")

    assert ranks(0) == ranks(0, importance=(1, 2, 30))  # scales have no common unit
    assert len({ranks(0), ranks(1), ranks(), ranks(0, importance=(0.1, 0.3, 0.2))}) == 4

    def gone(*removed, ratio=0.3):
        return pixels(figures.removed_layers({"a": {ratio: Plan(3, removed)}}), tmp_path / "x.png")

    assert len({gone(0), gone(1), gone(), gone(0, ratio=0.4)}) == 4
    for draw, plans in (
        (figures.removed_layers, {"a": {0.1: Plan(3, (0,)), 0.2: Plan(4, (0,))}}),
        (figures.importance_map, {}),
    ):
        with pytest.raises(SvlError, match="plans of one model"):
            draw(plans)


def test_gap_and_spectrum_show_their_data(tmp_path):
    def gap(after, before=0.3):
        return pixels(figures.feature_gap({"25 %": {"a": ([3, 4], [0.2, before], [0.1, after])}}), tmp_path / "x.png")

    assert len({gap(0.1), gap(0.2), gap(0.1, before=0.4), gap(0.001)}) == 4

    def spectrum(values=(4.0, 2.0, 1.0), squares=21.0, rank=1, panels=1):
        body = {"layer 3": (values, squares, rank)}
        return pixels(figures.spectrum({f"a {i}": body for i in range(panels)}), tmp_path / "x.png")

    variants = [spectrum(), spectrum((4.0, 2.0, 1.5)), spectrum(squares=30.0), spectrum(rank=2), spectrum(panels=3)]
    assert len(set(variants)) == 5


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
