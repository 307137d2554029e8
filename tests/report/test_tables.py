"""Tables: numbers worked out by hand, the paper's beside them, and every way of writing."""

import csv
import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from helpers.results import answers, demo, paper_runs, result, table_cells
from rich.console import Console

from svl.evaluation.score_statistics import Part
from svl.report import main, paper, table_writers
from svl.report.experiment_report import Report
from svl.report.paired_tests import paired_p
from svl.report.significance import difference_p
from svl.report.tables import error_text


def test_table(store):
    demo(store)
    (table,) = Report.read(store, "demo").tables
    lines = table_writers.as_markdown(table).splitlines()
    cells = [table_cells(line) for line in lines[:8]]
    heads = "strategy|seeds|ratio|removed|yes acc %|no acc %|average %|retained %|params|speed"
    assert cells[0] == heads.split("|")
    assert [set(cell) for cell in cells[1]] == [{":", "-"}] * 10
    # over three seeds: 10 points of deviation / sqrt(3), and 3 (of the questions) that are the same in all of them
    assert cells[2:] == [
        ["dense", "–", "0 %", "0 / 8", "90.0", "70.0", "80.0", "100.0", "8 M", "×1.00"],
        [
            "last\\_n (tis)",
            "1",
            "12.5 %",
            "1 / 8",
            "**85.0**",
            "**65.0**",
            "**75.0 ± 3.0**",
            "**93.8**",
            "6 M",
            "×1.25",
        ],
        ["short\\_lvlm", "1", "12.5 %", "1 / 8", "**80.0**", "**60.0**", "**70.0 ± 3.0**", "**87.5**", "6 M", "×1.25"],
        [
            "last\\_n (selector=none)",
            "1",
            "25 %",
            "2 / 8",
            "**60.0**",
            "**40.0**",
            "50.0 ± 3.0",
            "62.5",
            "6 M",
            "×1.25",
        ],
        ["random", "3", "25 %", "2 / 8", "50.0", "30.0", "40.0 ± 6.5", "50.0", "6 M", "×1.25"],
        ["short\\_lvlm", "1", "25 %", "2 / 8", "**70.0**", "**50.0**", "**60.0 ± 3.0**", "**75.0**", "6 M", "×1.25"],
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
        "random": ["–", "–", "12.5"],
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
    assert set(lines["short_lvlm (compensation=none)"] + lines["tail"]) == {"–"}  # the paper has no such rows
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


def run_with_answers(store, strategy, right, n=200, seed=0):
    """A run on one benchmark whose answers are stored; right on the questions `right` out of n."""
    removed = [{"tail": 7, "sleb": 6, "random": 5}[strategy] - seed]
    value = {"value": len(right) / n, "stderr": 0.03, "dense": 0.9}
    scores = {"t": {"metric": "accuracy", "n": n, "metrics": {"accuracy": value}}}
    keys = {"evaluate": [answers(store, right, removed, n=n, strategy=strategy)], "dense": []}
    plan = result()["plan"] | {"removed": removed}
    average = value | {"stderr": 0.03}
    more = {"scores": scores, "average": average, "keys": keys, "plan": plan, "retained": None}
    store.add(result(strategy, seed=seed, **more))


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


@pytest.mark.parametrize(("spread", "is_shown"), [(0, True), (2, True), (10, False)])
def test_rows_over_seeds_vary_over_questions_and_over_seeds(store, spread, is_shown):
    """Three seeds each; 16 of 200 questions between the means, the seeds of one method `spread` questions apart."""
    for seed, shift in enumerate((-spread, 0, spread)):
        run_with_answers(store, "tail", range(160), seed=seed)
        run_with_answers(store, "sleb", range(144 + shift), seed=seed)
    (section,) = Report.read(store, "demo").sections
    sleb, tail = section.rows
    counts = np.mean([[i < 144 + shift for i in range(200)] for shift in (-spread, 0, spread)], 0)
    changes = np.array([float(i < 160) for i in range(200)]) - counts
    questions, seeds = changes.var(ddof=1) / 200, (spread / 200) ** 2 / 3
    freedom = (questions + seeds) ** 2 / (questions**2 / 199 + seeds**2 / 2)
    expected = 2 * scipy.stats.t.sf(changes.mean() / (questions + seeds) ** 0.5, freedom)
    found = [difference_p(store, *rows, task) for rows in ((tail, sleb), (sleb, tail)) for task in ("t", None)]
    assert found == pytest.approx([expected] * 4)
    assert best(store)["average"] == ({"tail"} if is_shown else {"tail", "sleb"})
    assert sleb.score("t").draws == pytest.approx(seeds**0.5)


def test_paired_tests_are_mcnemars_where_answers_are_right_or_wrong():
    moved = [Part(0.01, i) for i in range(9)] + [Part(-0.01, i) for i in range(9, 11)] + [Part(0.0, 99)]
    assert paired_p(moved) == pytest.approx(scipy.stats.binomtest(9, 11).pvalue)
    assert paired_p([Part(0.0, 1)]) == 1.0
    twice = [Part(0.01, i % 5) for i in range(10)]  # two questions on each of five pictures: five independent changes
    assert paired_p(twice) == pytest.approx(2 / 2**5)


def test_paired_tests_of_shares_try_all_signs():
    values = [0.5, 0.25, -0.125, 0.4, 0.3, 0.05, 0.2]
    totals = np.array([abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=len(values))])
    exact = float((totals >= sum(values) - 1e-12).mean())
    assert paired_p([Part(value, i) for i, value in enumerate(values)]) == pytest.approx(exact, abs=0.01)


def test_without_any_error_nothing_is_shown_to_be_better(store):
    unknown = {"value": 0.9, "stderr": None, "dense": 0.95}
    store.add(result("a", average=unknown), result("b", average=unknown | {"value": 0.2}))
    assert best(store)["average"] == {"a", "b"}


# ------------------------------------------------------------------------------------------------- errors


def test_no_error_is_zero(store):
    """All right, or equal over seeds: the error is that of the interval, or of the questions."""
    sure = {"value": 1.0, "stderr": 0.0, "dense": 1.0}
    scores = {
        "t": {"metric": "accuracy", "n": 50, "metrics": {"accuracy": sure | {"low": 0.9286, "high": 1.0}}},
        "u": {"metric": "accuracy", "n": 50, "metrics": {"accuracy": sure}},
    }
    plans = [result()["plan"] | {"removed": [i]} for i in range(3)]
    store.add(*(result("same", level=0.6, seed=i, plan=plan) for i, plan in enumerate(plans)))
    store.add(result("right", scores=scores, average=sure, name="other"))
    (table,) = Report.read(store, "demo").tables
    assert [line.cells[6].text for line in table.lines] == ["80.0", "60.0 ± 3.0"]
    (table,) = Report.read(store, "other").tables
    assert [cell.error for cell in table.lines[1].cells[3:6]] == [pytest.approx(100 * 0.0714 / 3.919928), None, None]
    assert table.lines[1].cells[5].text == "100.0"
    assert "0.0" not in re.findall(r"pm\$\\,([\d.]+)", table_writers.as_latex([table]))
    assert [error_text(error, 1) for error in (2.34, 0.06, 0.04, 0.0012)] == ["2.3", "0.1", "0.04", "0.001"]


# ------------------------------------------------------------------------------------------------- recovery


def test_what_recovery_took_has_columns_only_where_there_was_any(store):
    device = {"type": "cuda", "name": "H100", "batch_size": 8}
    budget = {"samples": 12_000, "tokens": 3_400_000, "steps": 750, "seconds": 5400.0, "device": device}
    trained = {"recovery": "lora", "training": budget | {"shared_pictures": None}}
    store.add(result("tail"), result("short_lvlm", recovery="none", training=None))
    assert not any("training" in column.head for column in Report.read(store, "demo").tables[0].columns)
    store.add(result("sleb", **trained))
    for i in (0, 1):
        spent = trained["training"] | {"seconds": 30.0 + 60 * i}
        store.add(result("random", seed=i, level=i / 9, recovery="lora", training=spent))
    (table,) = Report.read(store, "demo").tables
    heads = [column.head for column in table.columns]
    places = [heads.index(f"training {name}") for name in ("steps", "samples", "tokens", "time")]
    found = [[line.cells[0].text, *(line.cells[j].text for j in places)] for line in table.lines]
    assert sorted(found) == [
        ["dense", "0", "0", "0", "0 s"],
        ["random", "750", "12 k", "3.4 M", "1 min"],
        ["short_lvlm", "0", "0", "0", "0 s"],
        ["sleb", "750", "12 k", "3.4 M", "1.5 h"],
        ["tail", "0", "0", "0", "0 s"],
    ]
    assert any("cuda H100" in note for note in table.notes)
    assert "training tokens" in table_writers.as_latex([table])


def test_where_each_row_was_trained_is_told(store):
    """By how many processes, too: seconds on two are not those on one."""
    budget = {"samples": 12, "tokens": 340, "steps": 7, "seconds": 5.0, "shared_pictures": None}
    device = {"type": "cuda", "name": "H100", "batch_size": 8}
    store.add(result("tail", recovery="lora", training={**budget, "device": {**device, "processes": 2}}))
    (table,) = Report.read(store, "demo").tables
    assert any("(on cuda H100, 2 processes)" in note for note in table.notes)
    store.add(result("sleb", recovery="lora", training={**budget, "device": device}), result("random", training=None))
    (table,) = Report.read(store, "demo").tables
    assert any("(sleb on cuda H100; tail on cuda H100, 2 processes)" in note for note in table.notes)


@pytest.mark.parametrize(
    ("unseen", "told"), [({}, "pixel by pixel)."), ({"videos_not_compared": 7}, "by pixel; videos were not compared).")]
)
def test_nothing_is_said_of_videos_that_were_not_compared(store, unseen, told):
    budget = {"samples": 12, "tokens": 340, "steps": 7, "seconds": 5.0, "shared_pictures": 0}
    store.add(result("tail", recovery="lora", training={**budget, "device": {"type": "cpu"}, **unseen}))
    (table,) = Report.read(store, "demo").tables
    (note,) = [note for note in table.notes if note.startswith("No picture of the benchmarks")]
    assert note.endswith(told)


def test_versions_that_differ_are_named(store):
    """What only runs with recovery record is no difference."""

    def cautions():
        (table,) = Report.read(store, "demo").tables
        return [note for note in table.notes if "versions" in note]

    store.add(result("tail", versions={"torch": "1"}), result("sleb", versions={"torch": "1", "peft": "1"}))
    assert cautions() == []
    store.add(result("random", versions={"torch": "2", "peft": "2"}))
    assert cautions() == ["Caution: the runs were made with different versions of peft, torch."]


# --------------------------------------------------------------------------------------------------- LaTeX


def test_a_papers_caption_has_no_housekeeping(store):
    demo(store)
    store.add(result("tail"), result("tail", level=0.5))  # one replaces the other
    (table,) = Report.read(store, "demo").tables
    text = table_writers.as_latex([table])
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert "yes (n = 100), no (n = 100)" in caption
    for word in ("demo", "older run", "seeds)", "accuracy", "Speed", "tis"):
        assert word not in caption
    assert "yes acc \\%" in text
    assert "% Left out: 1 older run(s)" in text


def test_losses_and_scores_have_no_average_in_a_table(store):
    """Also of results that were stored with one: nothing is shown, nothing is bold, and a note says why."""
    runs = [result("tail", level=0.5), result("sleb", level=0.6)]
    for run in runs:
        run["scores"]["demo_no"]["higher_is_better"] = False
    store.add(*runs)
    (table,) = Report.read(store, "demo").tables
    places = [i for i, column in enumerate(table.columns) if column.name in ("average", "retained")]
    cells = [line.cells[i] for line in table.lines for i in places if line.row]
    assert [cell.text for cell in cells] == ["–"] * 4
    assert not any(cell.best for cell in cells)
    assert any("No average over these benchmarks" in note and "demo_no (accuracy)" in note for note in table.notes)
    assert not any("Retained" in note for note in table.notes)
