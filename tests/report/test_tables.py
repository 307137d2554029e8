"""Tables: numbers worked out by hand, the paper's beside them, and every way of writing."""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.results import answers, demo, paper_runs, result, table_cells
from rich.console import Console

from svl.report import main, paper, table_writers
from svl.report.experiment_report import Report


def test_table(store):
    demo(store)
    (table,) = Report.read(store, "demo").tables
    lines = table_writers.as_markdown(table).splitlines()
    cells = [table_cells(line) for line in lines[:8]]
    heads = "strategy|ratio|removed|yes acc %|no acc %|average %|retained %|params|speed"
    assert cells[0] == heads.split("|")
    assert [set(cell) for cell in cells[1]] == [{":", "-"}] * 9
    assert cells[2:] == [
        ["dense", "0 %", "0 / 8", "90.0", "70.0", "80.0", "100.0", "8 M", "×1.00"],
        ["last\\_n (tis)", "12.5 %", "1 / 8", "**85.0**", "**65.0**", "**75.0 ± 3.0**", "**93.8**", "6 M", "×1.25"],
        ["short\\_lvlm", "12.5 %", "1 / 8", "**80.0**", "**60.0**", "**70.0 ± 3.0**", "**87.5**", "6 M", "×1.25"],
        ["last\\_n (none)", "25 %", "2 / 8", "**60.0**", "**40.0**", "50.0 ± 3.0", "62.5", "6 M", "×1.25"],
        ["random (3 seeds)", "25 %", "2 / 8", "50.0", "30.0", "40.0 ± 10.0", "50.0", "6 M", "×1.25"],
        ["short\\_lvlm", "25 %", "2 / 8", "**70.0**", "**50.0**", "**60.0 ± 3.0**", "**75.0**", "6 M", "×1.25"],
    ]
    assert r"demo\_yes (accuracy, n = 100), demo\_no" in lines[9]


def test_form_chance_and_likelihood_have_columns_where_they_are_known(store):
    """Averages in percent beside the leading one, with what they mean below; "–" where a run has none."""
    beside = {
        "likelihood": {"value": 0.71, "stderr": 0.02, "dense": 0.92},
        "above_chance": {"value": 0.452, "stderr": 0.03, "dense": 0.8},
        "off_format": {"value": 0.125, "stderr": 0.01, "dense": 0.0},
    }
    only_form = {"off_format": {"value": 0.5, "stderr": None, "dense": 0.0}}
    store.add(result("tail", beside=only_form), result("sleb"), result("short_lvlm", beside=beside))
    store.add(*(result("random", seed=s, beside={"off_format": {"value": s / 4, "dense": 0.0}}) for s in range(2)))
    (table,) = Report.read(store, "demo").tables
    heads = [column.head for column in table.columns]
    first = heads.index("average %") + 1
    assert heads[first : first + 4] == ["likelihood %", "above chance %", "off format %", "retained %"]
    cells = {line.cells[0].text: [cell.text for cell in line.cells[first : first + 3]] for line in table.lines}
    assert cells == {
        "dense": ["92.0", "80.0", "0.0"],  # of the newest run that has them
        "short_lvlm": ["71.0", "45.2", "12.5"],
        "sleb": ["–", "–", "–"],
        "tail": ["–", "–", "50.0"],
        "random (2 seeds)": ["–", "–", "12.5"],
    }
    said = [note.partition(":")[0] for note in table.notes]
    assert {"Likelihood", "Above chance", "Off format"} <= set(said)
    assert "measured: off format %" in table_writers.as_csv(table)
    assert main(["experiment=demo"]) == 0


def test_terminal_shows_every_number(store):
    demo(store)
    out = io.StringIO()
    Report.read(store, "demo").show(Console(file=out, width=40, force_terminal=True))
    assert "…" not in out.getvalue()
    bold = re.findall(r"\x1b\[1m *([\d.]+ ± [\d.]+)", out.getvalue())
    assert bold == ["75.0 ± 3.0", "70.0 ± 3.0", "60.0 ± 3.0"]  # 5 points are no significant difference, 10 are


def test_missing_and_large_values(store):
    scores = result()["scores"]
    for value, score in zip((1200.5, 300.0), scores.values(), strict=True):
        score["metrics"]["accuracy"] = {"value": value, "stderr": None, "dense": 1500.0}
    empty = {"value": None, "stderr": None}
    cost = result()["cost"] | {"samples_per_second": None}
    store.add(result(scores=scores, average=empty | {"dense": None}, retained=empty, cost=cost))
    (table,) = Report.read(store, "demo").tables
    assert [column.head for column in table.columns[3:6]] == ["yes acc", "no acc", "average %"]
    assert [cell.text for cell in table.lines[1].cells[3:]] == ["1200.5", "300.0", "–", "–", "6 M", "–"]
    assert not any(cell.best for line in table.lines for cell in line.cells)
    assert main(["experiment=demo"]) == 0


def test_table_csv(store):
    demo(store)
    (table,) = Report.read(store, "demo").tables
    rows = list(csv.DictReader(io.StringIO(table_writers.as_csv(table))))
    assert [row["strategy"] for row in rows][:3] == ["dense", "last_n (tis)", "short_lvlm"]
    first = {
        key: rows[1][f"measured: {key}"]
        for key in ("yes acc %", "yes acc error", "average %", "average error", "params")
    }
    assert first == {
        "yes acc %": "85", "yes acc error": "4", "average %": "75", "average error": "3", "params": "6000000",
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
    text = table_writers.as_latex(Report.read(store, "demo").tables)
    log = latex_builds(tmp_path, text)
    assert "Overfull" not in log
    assert r"\textbf{60.0}\,{\scriptsize$\pm$\,3.0}" in text
    assert r"\cmidrule(lr){4-13}\cmidrule(lr){14-20}" in text
    assert r"\multicolumn{7}{c}{paper}" in text


def test_paper_columns_are_apart(store):
    store.add(*paper_runs())
    (table,) = Report.read(store, "demo").tables
    heads = [column.head for column in table.columns if column.group == "paper"]
    names = ["aokvqa", "scienceqa", "mme", "pope", "mmbench", "seedbench", "average"]
    assert heads == [f"paper: {name} %".replace("mme %", "mme") for name in names]
    lines = {line.cells[0].text: [cell.text for cell in line.cells[-7:]] for line in table.lines}
    assert lines["dense"] == ["77.9", "65.6", "1246.4", "84.8", "64.3", "65.4", "70.1"]
    assert lines["short_lvlm (subspace)"] == ["77.8", "64.7", "1202.9", "84.6", "64.3", "64.6", "69.4"]
    assert set(lines["short_lvlm (none)"] + lines["tail"]) == {"–"}  # the paper has no such rows
    assert any("not measured here" in note for note in table.notes)
    assert "paper: pope %" in table_writers.as_csv(table)


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


# ---------------------------------------------------------------------------------------- the best of a ratio


def best(store):
    """Which rows are bold, by column."""
    (table,) = Report.read(store, "demo").tables
    marked = {}
    for j, column in enumerate(table.columns):
        if column.is_score:
            marked[column.name] = {line.row.label for line in table.lines if line.row and line.cells[j].best}
    return marked


def run_with_answers(store, strategy, right, n=200):
    """A run on one benchmark whose answers are stored; right on the questions `right` out of n."""
    removed = {"tail": [7], "sleb": [6], "random": [5]}[strategy]
    value = {"value": len(right) / n, "stderr": 0.03, "dense": 0.9}
    scores = {"t": {"metric": "accuracy", "n": n, "metrics": {"accuracy": value}}}
    keys = {"evaluate": [answers(store, right, removed, n=n)], "dense": []}
    plan = result()["plan"] | {"removed": removed}
    average = value | {"stderr": 0.03}
    store.add(result(strategy, scores=scores, average=average, keys=keys, plan=plan, retained=None))


def test_only_what_is_significantly_better_is_bold_alone(store):
    """Errors of 3 points each hide a difference of 8 points, unless answers are compared question by question."""
    run_with_answers(store, "tail", range(160))
    run_with_answers(store, "sleb", range(144))  # wrong on 16 more: a difference of 8 points, with an error of 1.9
    assert best(store)["t acc"] == {"tail"}
    run_with_answers(store, "random", range(2, 161))  # wrong on 2, right on 1 other: 0.5 points, with an error of 0.9
    assert best(store)["t acc"] == best(store)["average"] == {"tail", "random"}


def test_without_stored_answers_errors_count_as_independent(store):
    store.add(result("a", level=0.60), result("b", level=0.52), result("c", level=0.51))
    assert best(store)["average"] == {"a", "b"}  # 1.96 * 0.03 * sqrt(2) = 0.083


def test_samples_over_seeds_are_compared_by_their_means(store):
    store.add(*(result("a", level=level, seed=seed) for seed, level in enumerate((0.50, 0.54, 0.58))))
    store.add(*(result("b", level=level, seed=seed) for seed, level in enumerate((0.43, 0.47, 0.51))))
    # standard deviations of 0.04 over 3 seeds: 1.96 * 0.04 * sqrt(2 / 3) = 0.064 < 0.07
    assert best(store)["average"] == {"a"}
