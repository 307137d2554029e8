"""What an answer counts for every benchmark: by its own script, by lmms-eval 0.7.3, and here.

The scripts' rules are retold below in one line each (svl/evaluation/tasks has none of their code); lmms-eval's are run.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple

import pytest
from helpers.paths import ROOT

from svl.core import SvlError
from svl.demo.tasks import utils as demo
from svl.evaluation import benchmarks
from svl.evaluation.answer_items import choice_items
from svl.evaluation.tasks import utils

pytest.importorskip("lmms_eval")
Document = dict[str, Any]


MARKS = {None: ".", 0.0: "0", 1.0: "1"}  # unknown, wrong, right; "p": in part


def upstream(task: str, name: str) -> Any:
    return getattr(importlib.import_module(f"lmms_eval.tasks.{task}.utils"), name)


def score(items: dict[str, Any], metric: str) -> float:
    item = items[metric]
    return float(item["score"] if isinstance(item, dict) else item)


# ------------------------------------------------------------------------ the rules of the benchmarks' own scripts


def pope_official(text: str, doc: Document) -> float:
    says_no = {"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" "))
    return float(("no" if says_no else "yes") == doc["answer"])


def mme_official(text: str, doc: Document) -> float:
    start = text.lower() if text.lower() in ("yes", "no") else text.lower()[:4]
    said = next((word for word in ("yes", "no") if word in start), None)
    return float(said == doc["answer"].lower())


def scienceqa_official(text: str, doc: Document) -> float:  # LLaVA's eval_science_qa.py
    found = re.match(r"([A-E])(?:$|\. )", text.replace("\n", ". ")) or re.search(r"The answer is ([A-E])", text)
    return float(bool(found) and found[1] == "ABCDE"[doc["answer"]])


def mmstar_official(text: str, doc: Document) -> float:
    starts = tuple(f"{lead}{doc['answer'].lower()}" for lead in ("", "(", "option ", "the answer is "))
    return float(text.lower().startswith(starts))


def videomme_official(text: str, doc: Document) -> float:
    for lead in ("The best answer is", "The correct answer is", "The answer is", "The answer", "Answer:"):
        text = text.replace(lead, "")
    found = re.search("[ABCD]", text)
    return float(bool(found) and found[0] == doc["answer"])


def mvbench_official(text: str, doc: Document) -> float:
    said, right = text.lower().split(" ")[0].replace(".", ""), f"({'abc'[doc['candidates'].index(doc['answer'])]})"
    return float(said in right or right in said)


def vqa_official(text: str, doc: Document) -> float:  # the processor's own tests are upstream's
    return float(
        upstream("textvqa", "textvqa_process_results")({**doc, "answers": list(doc["answers"])}, [text])["exact_match"]
    )


def mmbench_lmms(text: str, doc: Document) -> float:
    evaluator = importlib.import_module("lmms_eval.tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    return float(evaluator.can_infer(text, {k: doc[k] for k in "ABCD"}) == doc["answer"])


class Case(NamedTuple):
    """A benchmark's document, its rules, and by answer what they say: official, lmms-eval, here (MARKS)."""

    doc: Document
    metric: str
    here: Any
    lmms: Any
    official: Any
    verdicts: dict[str, str]


ABCD = {"A": "red", "B": "green", "C": "blue", "D": "gray"}
CHOICES = list(ABCD.values())
CASES = {
    "svl_pope": Case(
        {"answer": "yes", "question_id": "1", "category": "random"}, "accuracy", utils.pope,
        lambda text, doc: score(upstream("pope", "pope_process_results")(doc, [text]), "pope_accuracy"), pope_official,
        {"yes": "111", "Yes.": "101", "Yes, there is.": "101", "**Yes**": "101", "The answer is yes": "101",
            "red": "100",
         "": "100", "no": "000", "There is not": "000", "Yes, and no dog": "001", "Yes or no": "000", "None": "100"},
    ),
    "svl_mme": Case(
        {"answer": "No", "question_id": "1", "category": "count"}, "perception", utils.mme,
        lambda text, doc: score(upstream("mme", "mme_process_results")(doc, [text]), "mme_perception_score"),
            mme_official,
        {"no": "111", "No.": "111", "No, it is": "111", "**No**": "111", "The answer is no.": "001", "snow": "110",
         "nothing": "110", "none of it": "110", "Yes": "000", "I know": "000", "": "000", "n": "011"},
    ),
    "svl_scienceqa": Case(
        {"answer": 1, "choices": CHOICES}, "exact_match", utils.scienceqa,
        lambda text, doc: score(upstream("scienceqa", "sqa_process_results")(doc, [text]), "exact_match"),
            scienceqa_official,
        {"B": "111", "b": "011", "B.": "011", "B. green": "111", "B\ngreen": "101", "The answer is B.": "101",
            "(B)": "001",
         "B: green": "001", "green": "001", "A red one": "000", "The answer is A": "000", "A": "000"},
    ),
    "svl_mmbench": Case(
        {**ABCD, "answer": "B", "index": 1}, "accuracy", utils.mmbench, mmbench_lmms, None,
        {"B": ".11", "(B)": ".11", "B. green": ".11", "green": ".11", "It is green, not blue": ".00", "Dog": ".00",
         "**B**": ".01", "The answer is: B\nA. red": ".11", "b": ".01", "A big green one": ".10"},
    ),
    "svl_seedbench": Case(
        {**{f"choice_{k.lower()}": v for k, v in ABCD.items()}, "answer": "A", "question_id": "1",
            "data_type": "image"},
        "accuracy", utils.seedbench,
        lambda text, doc: upstream("seedbench", "seed_aggregation_result")(
            [upstream("seedbench", "seed_process_result")(doc, [text])["seed_all"]]
        ),
        lambda text, doc: float(text == doc["answer"]),  # LLaVA's; SEED-Bench's own compares likelihoods
        {"A": "111", "a": "011", "A.": "011", "A. red": "011", "a dog": "010", "And so": "010", "**A**": "001",
            "red": "001",
         "B": "000", "The answer is A": "001", "(A)": "001"},
    ),
    "svl_aokvqa": Case(
        {"choices": CHOICES, "correct_choice_idx": 1}, "accuracy", utils.aokvqa, None,
        lambda text, doc: float(text == doc["choices"][doc["correct_choice_idx"]]),
        {"green": "1.1", "B": "0.1", "B. green": "0.1", "Green.": "0.1", "red": "0.0", "A green one": "0.0"},
    ),
    "svl_ai2d": Case(
        {"options": CHOICES, "answer": "1"}, "exact_match", utils.ai2d,
        lambda text, doc: score(utils.ai2d(doc, [text]), "upstream_exact_match"), None,
        {"B": ".11", "b.": ".11", "B. green": ".11", "(B)": ".11", "B) green": ".01", "**B**": ".11", "green": ".01",
            "A": ".00"},
    ),
    "svl_mmstar": Case(
        {"answer": "B", "index": 1, "category": "math", "l2_category": "geometry"}, "accuracy", utils.mmstar,
        lambda text, doc: score(upstream("mmstar", "mmstar_process_results")(doc, [text]), "average"), mmstar_official,
        {"B": "111", "b": "101", "(B) green": "111", "Option B": "111", "The answer is B": "111", "Because": "110",
            "Big": "110",
         "**B**": "011", "A": "000", "Answer: B": "011"},
    ),
    "svl_realworldqa": Case(
        {"question": "Which?\nA. red\nB. green\nPlease", "answer": "B"}, "accuracy", utils.realworldqa,
        lambda text, doc: score(upstream("realworldqa", "realworldqa_process_results")(doc, [text]), "exact_match"),
            None,
        {"B": ".11", "B. green": ".11", "green": ".01", "Both": ".10", "b": ".01", "**B**": ".11", "A": ".00"},
    ),
    "svl_mmmu": Case(
        {"question_type": "multiple-choice", "options": str(CHOICES), "answer": "B", "id": "validation_Art_1"},
            "accuracy",
        utils.mmmu,
        lambda text, doc: float(upstream("mmmu", "mmmu_process_results")(doc,
            [text])["mmmu_acc"]["parsed_pred"][0] == "B"),
        None,  # lmms-eval's is MMMU's own: without a letter, a random one
        {"B": ".11", "(B)": ".11", "B. green": ".11", "The answer is B.": ".11", "A, then B ": ".10", "A": ".00"},
    ),
    "svl_videomme": Case(
        {"answer": "B", "options": [f"{k}. {v}." for k, v in ABCD.items()], "domain": "x", "sub_category": "x",
         "task_type": "x", "question_id": "1", "duration": "short", "videoID": "v"}, "accuracy", utils.videomme,
        lambda text, doc: score(upstream("videomme", "videomme_process_results")(doc, [text]),
            "videomme_perception_score"),
        videomme_official,
        {"B": "111", "B. green": "111", "The best answer is B.": "111", "Because": "110", "b": "001", "Green.": "001",
         "A": "000", "**B**": "111"},
    ),
    "svl_mvbench_*": Case(
        {"candidates": CHOICES[:3], "answer": "green"}, "accuracy", utils.mvbench,
        lambda text, doc: score(upstream("mvbench", "mvbench_process_results")(doc, [text]), "mvbench_accuracy"),
        mvbench_official,
        {"(B)": "111", "(B) green": "111", "B.": "111", "b": "111", "B) green": "111", "**(B)**": "111", "green": "001",
         "The answer is B": "011", "(A)": "000"},
    ),
    "svl_gqa": Case(
        {"answer": "dog"}, "exact_match", utils.gqa,
        lambda text, doc: score(utils.gqa(doc, [text]), "upstream_exact_match"),
        lambda text, doc: float(text.rstrip(".").lower() == doc["answer"]),  # with LLaVA's conversion
        {"dog": "111", "Dog.": "111", "**dog**": "011", "a dog": "001", "The answer is dog.": "001", "dog\ncat": "001",
         "It is a dog": "001", "dogs": "000", "A dog and a cat": "000"},
    ),
    "svl_textvqa": Case(
        {"answers": ["dog"] * 10, "question_id": 1}, "exact_match", utils.vqa, vqa_official, vqa_official,
        {"dog": "111", "a dog.": "111", "The dog": "111", "dog\ncat": "001", "**dog**": "001", "Answer: dog": "001",
            "dogs": "000"},
    ),
    "svl_vizwiz": Case(
        {"answers": ["unanswerable"] * 4 + ["red"] * 6, "question_id": 1}, "exact_match", utils.vqa,
        lambda text, doc: upstream("vizwiz_vqa", "vizwiz_vqa_process_results")({**doc,
            "answers": list(doc["answers"])}, [text])[
            "exact_match"
        ],
        vqa_official,
        {"red": "111", "unanswerable": "111", "Red.": "111", "red\n\nIt": "001", "`red`": "111", "**red**": "001",
            "blue": "000"},
    ),
    "svl_docvqa": Case(
        {"answers": ["12 March"]}, "anls", utils.docvqa, lambda text, doc: score(utils.docvqa(doc, [text]),
            "upstream_anls"),
        lambda text, doc: score(utils.docvqa(doc, [text]), "upstream_anls"),
        {"12 march": "111", "12 March": "111", "**12 March**": "pp1", "The answer is 12 March.": "001", "x": "000"},
    ),
    "svl_chartqa": Case(
        {"answer": "12", "type": "human_test"}, "relaxed_overall", utils.chartqa,
        lambda text, doc: score(upstream("chartqa", "chartqa_process_results")(doc, [text]), "relaxed_overall"),
        lambda text, doc: float(upstream("chartqa", "relaxed_correctness")(text, doc["answer"])),
        {"12": "111", "12.5": "111", "12.": "111", "12.5.": "001", "12%": "001", "$12": "001", "12 people": "001",
            "about 12": "001",
         "**12**": "001", "Twelve.": "001", "The answer is 12.": "001", "13": "000", "12 or 13": "000",
          "12 million": "000"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdicts_of_the_script_of_lmms_eval_and_ours(name):
    case = CASES[name]
    found = {}
    for text in case.verdicts:
        ours = score(case.here(case.doc, [text]), case.metric)
        others = [rule(text, dict(case.doc)) if rule else None for rule in (case.official, case.lmms)]
        found[text] = "".join(MARKS.get(verdict, "p") for verdict in (*others, ours))
    assert found == case.verdicts


def test_every_benchmark_has_cases_and_a_line_in_the_documentation():
    tasks = {re.sub(r"_mvbench_.*", "_mvbench_*", name) for name in benchmarks.task_files(benchmarks.OWN)}
    assert set(CASES) == tasks
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    section = page.partition("## How answers are read")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `svl_")]
    described = {name for line in lines for name in re.findall(r"`(svl_[\w*]+)`", line.split("|")[1])}
    bundled = set(benchmarks.task_files(ROOT / "svl" / "demo" / "tasks")) - {"svl_prose_fiction", "svl_prose_essays"}
    assert described == tasks | bundled
    assert all(len(line.strip("|").split(" | ")) == 4 for line in lines)  # task, its script, here, lmms-eval


def test_every_task_tells_its_share_off_format_and_what_is_above_chance():
    """All of svl's and all bundled ones that ask for answers; above chance, where it says what options there are."""
    for folder in (benchmarks.OWN, ROOT / "svl" / "demo" / "tasks"):
        for name in benchmarks.task_files(folder):
            settings = benchmarks.task_settings(name, str(folder))
            listed = {entry["metric"]: entry for entry in settings["metric_list"]}
            if settings["output_type"] == "perplexity":
                continue
            assert listed["off_format"]["higher_is_better"] is False
            assert ("above_chance" in listed) == ("options" in settings), name


def test_what_a_strict_script_accepts_is_never_lost():
    """An answer that happens to look like form: a sign that says "It is what it is", a period that belongs to it."""
    for text, answers in (("It is what it is", ["it is what it is"]), ("U.S.", ["U.S."]), ("#love", ["#love"])):
        assert score(utils.docvqa({"answers": answers}, [text]), "anls") == 1
        assert score(utils.vqa({"answers": answers * 10}, [text]), "exact_match") == 1
        assert score(utils.gqa({"answer": answers[0]}, [text]), "exact_match") == 1


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("12%", ["12%", "12", "0.12", "12 percent."], ["0.5", "$12", "14%"]),
        ("5 May", ["5 May", "5 may."], ["5 June", "6 May"]),
        ("0", ["0", "zero", "0."], ["1", "none"]),
        ("-4.2", ["-4.2", "−4.2", "-4.3"], ["4.2"]),
        ("1,200", ["1200", "1,200.", "$1,210"], ["1.2", "2100"]),
        ("United States", ["united states.", "The answer is: United States"], ["United", "States of America"]),
    ],
)
def test_relaxed_matches(target, right, wrong):
    assert all(utils.is_relaxed_match(text, target) for text in right)
    assert not any(utils.is_relaxed_match(text, target) for text in wrong)


def test_open_questions_of_mmmu_and_realworldqa():
    doc = {"question_type": "open", "options": "[]", "answer": "['12', '12.0']", "id": "validation_Art_1"}
    for text, right in (("12", 1), ("The answer is 12.", 1), ("**12**", 1), ("13", 0)):
        assert score(utils.mmmu(doc, [text]), "accuracy") == right
    assert "above_chance" not in utils.mmmu(doc, ["12"])
    doc = {"question": "How many?", "answer": "Three"}
    for text, right in (("three.", 1), ("**Three**", 1), ("two", 0)):
        items = utils.realworldqa(doc, [text])
        assert (score(items, "accuracy"), "above_chance" in items) == (right, False)


def test_yes_no_and_numbers_among_open_questions_are_read_as_such():
    """What counts in a benchmark of yes-or-no questions counts in a mixed one; words for numbers, and what follows."""
    for text, right in (("Yes, it is", 1), ("**Yes**, there is.", 1), ("yes yes yes", 1), ("No, it is not", 0)):
        assert score(utils.gqa({"answer": "yes"}, [text]), "exact_match") == right
        assert score(utils.vqa({"answers": ["yes"] * 10}, [text]), "exact_match") == right
        assert score(utils.chartqa({"answer": "Yes", "type": "human_test"}, [text]), "relaxed_overall") == right
        assert score(utils.realworldqa({"question": "Is it?", "answer": "Yes"}, [text]), "accuracy") == right
    for text, right in (("Two", 1), ("2 cars", 1), ("There are 2.", 1), ("two or three", 0), ("3", 0)):
        assert score(utils.realworldqa({"question": "How many?", "answer": "2"}, [text]), "accuracy") == right
        assert score(utils.gqa({"answer": "2"}, [text]), "exact_match") == right
    for answer, text in (("7 up", "7"), ("50 mph", "50"), ("5 am", "5 pm"), ("5 am", "5"), ("3m", "3"), ("2", "2 pm")):
        assert score(utils.vqa({"answers": [answer] * 10}, [text]), "exact_match") == 0
    assert score(utils.vqa({"answers": ["2"] * 10}, ["There are 2."]), "exact_match") == 1
    assert not utils.is_relaxed_match(".5", "5")
    assert not utils.is_relaxed_match("5", ".5")


def test_an_open_answer_is_off_format_if_the_strict_rule_misses_it():
    chart = {"answer": "12", "type": "human_test"}
    for text, off in (("12", 0), ("12.", 0), ("The total is 12", 1), ("about 12", 1), ("12 people", 1), ("13", 0)):
        assert score(utils.chartqa(chart, [text]), "off_format") == off, text
    for text, answer in (("42", "42.0"), ("0.50", "0.5")):
        assert score(utils.chartqa({**chart, "answer": answer}, [text]), "off_format") == 0
    assert score(utils.vqa({"answers": ["2"] * 10}, ["two"]), "off_format") == 0
    for text, off in (("dog", 0), ("Dog.", 0), ("a dog", 1), ("**dog**", 1), ("cat", 0), ("It is a cat", 1)):
        assert score(utils.gqa({"answer": "dog"}, [text]), "off_format") == off, text
    video = {"candidates": ["red", "green"], "answer": "green"}
    for text, off in (("(B)", 0), ("(B) green", 0), ("B", 0), ("B. green", 0), ("**B**", 1), ("green", 1)):
        assert score(utils.mvbench(video, [text]), "off_format") == off, text


def test_the_script_of_pope_reads_answers_without_white_space_around():
    assert [utils.pope_script_answer(text) for text in ("No\n", "\nNo", " no ", "Note", "Yes\n")] == [
        *("no", "no", "no", "yes", "yes")
    ]


def test_questions_that_cannot_be_scored_are_named():
    with pytest.raises(SvlError, match="27 choices, more than there are letters"):
        utils.aokvqa({"choices": [str(i) for i in range(27)], "correct_choice_idx": 0}, ["A"])
    with pytest.raises(SvlError, match="'blue' is none of the candidates"):
        utils.mvbench({"candidates": ["red", "green"], "answer": "blue"}, ["A"])
    with pytest.raises(SvlError, match="no options"):
        choice_items("A", {}, "A")
    assert score(utils.scienceqa({"choices": list("abcdefghijklm"), "answer": 11}, ["L"]), "exact_match") == 1
    assert utils.mmbench_options({"A": "x", "B": "y", "C": float("nan"), "D": "nan", "E": None}) == ["A", "B"]


def test_the_bundled_questions():
    choice = {"kind": "choice", "answer": "B", "options": ["red", "green"], "prompt": "Which?\nA. red\nB. green"}
    for text in ("B", "(b)", "**B**\n", "green", "The answer is B."):
        for found in (demo.choice(choice, [text]), demo.read_answer(choice, [text])):
            assert (score(found, "accuracy"), found["above_chance"]["chance"]) == (1, 0.5)
    for text, right in (("Yes, they are", 1), ("no", 0), ("yes or no", 0)):
        found = demo.short_answer({"kind": "compare", "answer": "yes"}, [text])
        assert score(found, "accuracy") == score(found, "accuracy_compare") == right
    assert demo.options(choice) == ["A", "B"]
    assert demo.options({"answer": "no", "prompt": "Is there?"}) == ["yes", "no"]
    assert demo.options({"answer": "3", "prompt": "How many?"}) == []
    row = {"answer": "small red circle, large blue cross"}
    assert score(demo.description(row, ["**Small red circle, large blue cross.**\nNext"]), "accuracy") == 1
    assert score(demo.description(row, ["small red circle"]), "accuracy") == 0
