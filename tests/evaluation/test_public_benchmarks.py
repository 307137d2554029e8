"""The public benchmarks, through lmms-eval's own task code, on stand-ins with the real columns."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.tasks import benchmark, sample_rows, script

from svl.core import SvlError
from svl.evaluation import benchmarks
from svl.evaluation.conversations import images_of
from svl.evaluation.settings import TaskOptions
from svl.evaluation.tasks import utils
from svl.run import run_result
from svl.store.artifacts import Entry

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluation.evaluate")

OPPOSITE = {"yes": "no", "no": "yes", "A": "B", "B": "C", "C": "D", "D": "A"}
GARBAGE = ["Dog Apple Cat Big", "nothing about snow", "a dog", "", "!!!!!!", "I cannot say; Both are There"]


def choices(doc: dict[str, Any]) -> str:
    return "ABCD"[doc["correct_choice_idx"]]


# What a model that knows everything says.
ORACLES = {
    "aokvqa": choices,
    "scienceqa": lambda doc: "ABCD"[doc["answer"]],
    "mme": lambda doc: doc["answer"],
    "pope": lambda doc: doc["answer"],
    "mmbench": lambda doc: doc["answer"],
    "seedbench": lambda doc: doc["answer"],
    "gqa": lambda doc: doc["answer"],
    "textvqa": lambda doc: doc["answers"][0],
    "vizwiz": lambda doc: doc["answers"][0],
    "mmmu": lambda doc: doc["answer"],
    "realworldqa": lambda doc: doc["answer"],
    "mmstar": lambda doc: doc["answer"],
    "ai2d": lambda doc: "ABCD"[int(doc["answer"])],
    "chartqa": lambda doc: doc["answer"],
    "docvqa": lambda doc: doc["answers"][-1],
}


@pytest.fixture(scope="session")
def standins(tmp_path_factory) -> Path:
    return script("make_standins").write(tmp_path_factory.mktemp("standins"))


@pytest.fixture
def run(llava, standins, tmp_path, monkeypatch):
    """Evaluate one benchmark with answers made by a function of the document -> (result, rows of samples.jsonl)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(standins / "cache"))

    def call(name: str, answer: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def answers(self, requests, cap):
            docs = [self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]] for r in requests]
            for request in requests:
                images = images_of(self.conversation(request))
                assert images
                assert all(image.mode == "RGB" for image in images)
            return [(answer(doc),) for doc in docs]  # of one model

        monkeypatch.setattr(evaluation.Answerer, "answer_batch", answers)
        ((task, chosen),) = benchmark(name).tasks.items()
        settings = {"metric": chosen.metric, "style": chosen.style, "data": str(standins), "batch_size": 4, **options}
        return evaluation.evaluate(llava, task, TaskOptions(**settings), tmp_path), sample_rows(tmp_path)

    return call


def main(result: dict[str, Any]) -> float:
    return result["metrics"][result["metric"]]["value"]


# ------------------------------------------------------------------------------------------ every benchmark


def test_every_benchmark_is_covered():
    assert set(benchmark("all").tasks) == {task for name in ORACLES for task in benchmark(name).tasks}
    videos = {**benchmark("videomme").tasks, **benchmark("mvbench").tasks}  # see test_video_benchmarks
    assert set(benchmarks.task_files(benchmarks.OWN)) == {*benchmark("all").tasks, *videos}


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_scores_all_its_opposite_and_garbage_nothing(name, run):
    chosen = benchmark(name)
    (settings,) = chosen.tasks.values()
    result, rows = run(name, ORACLES[name])
    best = 1 if name != "mme" else 400  # two categories of perception; 2000 with all ten
    assert main(result) == pytest.approx(best)
    assert result["higher_is_better"] == settings.higher_is_better
    assert result["max_new_tokens"] <= settings.max_new_tokens <= 32
    assert result["n"] == len(rows)
    assert all(row["score"] in (1, None) for row in rows)  # None: not of the main metric
    assert result["prompt"]["style"] == "default"
    assert "user " in result["prompt"]["first"]  # the chat template of the model
    upstream = [v["value"] for k, v in result["metrics"].items() if k.startswith(benchmarks.UPSTREAM)]
    assert bool(upstream) == (name != "aokvqa")  # which lmms-eval has not
    if name != "pope":  # whose ratio of answers is none of labels
        assert {v for v in upstream if v is not None} <= {1, 100, 400}

    def wrong(doc):
        answer = ORACLES[name](doc)
        return OPPOSITE.get(answer, OPPOSITE.get(answer.lower(), "nothing"))

    result, rows = run(name, wrong)
    assert main(result) == 0
    assert not any(row["score"] for row in rows)

    chance = random.Random(0)
    result, rows = run(name, lambda doc: chance.choice(GARBAGE))
    assert main(result) == 0
    assert not any(row["score"] for row in rows)
    found = result["metrics"][result["metric"]]
    if name == "mme":
        assert (found["low"], found["high"]) == (None, None)  # points are no share
    else:
        assert found["low"] == 0 < found["high"] < 1  # the error is 0, the interval has a width


@pytest.mark.parametrize("name", ORACLES)
def test_every_benchmark_has_errors_and_a_paired_comparison(name, run, tmp_path):
    """Half the answers right, and two thirds: the main metric and the retained share have standard errors."""

    def some(share):
        chance = random.Random(1)

        def answer(doc):
            right = chance.random() < share
            if name == "mmbench":  # two of its three questions, in every rotation
                right = utils.mmbench_question(doc) % 3 != (share > 0.6)
            return ORACLES[name](doc) if right else "???"

        return answer

    entries = []
    for share in (0.5, 0.7):
        result, _ = run(name, some(share))
        folder = tmp_path / str(share)
        folder.mkdir()
        (tmp_path / "samples.jsonl").rename(folder / "samples.jsonl")
        entries.append(Entry(folder, {"output": result}))
        known = [m for m, v in result["metrics"].items() if v["value"] is not None and v["stderr"] is not None]
        assert result["metric"] in known
        assert result["metrics"][result["metric"]]["stderr"] > 0
        assert {"off_format", "above_chance"} & set(result["metrics"]) <= set(known)
    (chosen,) = benchmark(name).tasks.values()
    summary = run_result.summarise({name: entries[0]}, {name: entries[1]}, {name: chosen.scale})
    assert 0 < summary["retained"]["value"] < 1.5
    assert summary["retained"]["stderr"] > 0
    change = summary["scores"][name]["change"]
    assert 0 < change["agreement"] <= 1
    assert 0 < change["p"] <= 1


# ---------------------------------------------------------------------------------------------- corrections


def test_a_limit_takes_whole_pairs_and_rotations_and_never_leaks(run):
    _, every = run("mme", ORACLES["mme"])
    result, rows = run("mme", ORACLES["mme"], limit=3)
    assert (result["n"], result["limit"]) == (6, 3)
    assert [row["doc_id"] for row in rows] == [0, 1, 2, 8, 9, 10]  # rows of the data, not of the selection
    assert all(row == {**every[row["doc_id"]], "part": row["part"]} for row in rows)
    assert set(Counter(row["unit"] for row in rows).values()) == {2}
    result, rows = run("mmbench", ORACLES["mmbench"], limit=1)
    assert (result["n"], main(result)) == (4, 1)
    for share, n in ((0.5, 4), (0.2, 2)):
        assert [run(name, ORACLES[name], limit=share)[0]["n"] for name in ("gqa", "ai2d")] == [n, [3, 2][n == 2]]
    assert run("gqa", ORACLES["gqa"], limit=99)[0]["n"] == 8


def test_pope_counts_what_was_answered(run):
    said = {"yes": "Yes.", "no": "yes, there is"}
    result, _ = run("pope", lambda doc: said[doc["answer"]])
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert (found["accuracy"], found["recall"], found["precision"], found["yes_ratio"]) == (0.5, 1, 0.5, 1)
    assert found["f1"] == pytest.approx(2 / 3) == found["f1_splits"]
    assert (found["upstream_pope_accuracy"], found["upstream_pope_yes_ratio"]) == (0, 0.5)  # of labels
    result, _ = run("pope", lambda doc: "yes" if doc["question_id"] == "1" else "maybe")
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert found["recall"] == pytest.approx(1 / 6)  # unreadable answers are misses
    assert found["upstream_pope_recall"] == 1


def test_pope_by_the_rules_of_its_script_and_of_llava(run):
    """Of each split two positives and two negatives: all answered yes, all no (in a sentence), and all right."""
    said = {"random": lambda doc: "It seems so.", "popular": lambda doc: "There is not", "adversarial": ORACLES["pope"]}
    result, _ = run("pope", lambda doc: said[doc["category"]](doc))
    found = {name: metric["value"] for name, metric in result["metrics"].items()}
    by_split = [2 * 2 / (2 * 2 + 2), 0, 1]  # 2 TP / (2 TP + FP + FN)
    assert found["f1_llava"] == pytest.approx(sum(by_split) / 3)
    assert found["f1_official"] == pytest.approx(2 * 4 / (2 * 4 + 2 + 2))
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 4))  # neither sentence says yes or no
    assert result["metrics"]["f1_official"]["stderr"] > 0
    assert 0 < result["metrics"]["f1_llava"]["low"] < result["metrics"]["f1_llava"]["high"] < 1


def test_a_final_period_is_no_error_of_chartqa(run):
    plain, _ = run("chartqa", ORACLES["chartqa"])
    ended, _ = run("chartqa", lambda doc: f"**{doc['answer']}**.\nThat is all.")
    assert main(plain) == main(ended) == 1
    assert (plain["metrics"]["off_format"]["value"], ended["metrics"]["off_format"]["value"]) == (0, 1)
    assert ended["metrics"]["upstream_relaxed_overall"]["value"] == 0


@pytest.mark.parametrize("name", ORACLES)
def test_every_benchmark_counts_what_was_only_read_without_its_form(name, run):
    """All right, but in bold and with more behind: the score of the plain answers, and nothing kept the form."""
    result, _ = run(name, lambda doc: f"The answer is: **{ORACLES[name](doc)}**\n\nThe picture shows it.")
    assert main(result) == (1 if name != "mme" else 400)
    assert result["metrics"]["off_format"]["value"] == 1
    assert result["metrics"]["off_format"]["low"] > 0.3
    assert result["metrics"].get("above_chance", {"value": 1})["value"] == pytest.approx(1)


def test_no_letter_is_drawn_or_dug_out_of_words(run):
    for name, upstream in (("mmmu", "mmmu_acc"), ("realworldqa", "exact_match"), ("seedbench", "seed_image")):
        words = {"A": "Ape", "B": "Bee", "C": "Cow", "D": "Dog"}
        result, _ = run(name, lambda doc, words=words: words.get(doc["answer"], "?"))
        assert main(result) == 0
        assert result["metrics"][f"upstream_{upstream}"]["value"] > 0
        assert run(name, lambda doc, words=words: words.get(doc["answer"], "?"))[0]["metrics"] == result["metrics"]


def test_copies_of_data_sets_in_either_form(run, standins, tmp_path):
    saved = datasets.load_dataset(str(standins / "POPE"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "copies" / "POPE"))
    result, rows = run("pope", ORACLES["pope"], data=str(tmp_path / "copies"))
    assert (main(result), len(rows)) == (1, 12)
    with pytest.raises(SvlError, match=r"benchmark.data: .* has no folder 'MME', a copy of the data set"):
        run("mme", ORACLES["mme"], data=str(tmp_path / "copies"))


def test_failures_name_rows_of_the_data(llava, standins, tmp_path, monkeypatch):
    """Under a limit that takes pairs, lmms-eval's numbers are those of the selection."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(standins / "cache"))

    def fail(**inputs):
        raise IndexError("list index out of range")

    monkeypatch.setattr(llava.model, "generate", fail)
    options = TaskOptions("perception", limit=3, batch_size=9, data=str(standins))
    with pytest.raises(SvlError, match=r"task 'svl_mme': no answer to documents 0, 1, 2, 8, 9, 10 \("):
        evaluation.evaluate(llava, "svl_mme", options, tmp_path)


def test_questions_on_one_image_are_one_unit(run):
    """POPE, GQA and others: the image's id, where the data have one, in every line of the samples."""
    columns = {"pope": "image_source", "gqa": "imageId", "textvqa": "image_id", "docvqa": "docId"}
    columns |= {"seedbench": "data_id"}
    for name, column in columns.items():
        ((task, _),) = benchmark(name).tasks.items()
        assert benchmarks.task_settings(task, None)["unit"] == column
    answered = []
    result, rows = run("pope", lambda doc: answered.append(doc["image_source"]) or "yes")
    assert [row["unit"] for row in rows] == [f"COCO_val2014_{i // 2:012}" for i in range(12)]
    _, rows = run("gqa", ORACLES["gqa"])
    assert [row["unit"] for row in rows] == [f"n{i * 2 % 5}" for i in range(8)]
    # every image of the stand-in has one "yes" and one "no": what its two questions say together never changes
    assert result["metrics"]["accuracy"]["value"] == 0.5
    assert result["metrics"]["accuracy"]["stderr"] == 0


def test_indices_of_mmbench_may_be_text(run, standins, tmp_path):
    data = datasets.load_dataset(str(standins / "MMBench"), "en", cache_dir=str(tmp_path / "cache"))
    data = data.cast_column("index", datasets.Value("string"))
    data.save_to_disk(str(tmp_path / "copies" / "MMBench"))
    plain, _ = run("mmbench", ORACLES["mmbench"])
    result, _ = run("mmbench", ORACLES["mmbench"], data=str(tmp_path / "copies"))
    assert result["metrics"] == plain["metrics"]
    assert any(name.startswith(benchmarks.UPSTREAM) for name in result["metrics"])


def test_an_upstream_metric_that_fails_is_a_warning(run, monkeypatch, caplog):
    """Whether it fails on a document or on all of them."""
    fine, _ = run("mme", ORACLES["mme"])
    for name in ("mme_process_results", "mme_aggregate_results"):
        caplog.clear()
        broken = upstream_scoring_that_fails(name)
        monkeypatch.setattr("svl.evaluation.lmms_tasks.corrected_config", broken)
        result, _ = run("mme", ORACLES["mme"])
        (record,) = [record for record in caplog.records if "own scoring fails" in record.message]
        assert "ZeroDivisionError: no" in record.message
        ours = {k: v for k, v in fine["metrics"].items() if not k.startswith(benchmarks.UPSTREAM)}
        kept = {k: v for k, v in result["metrics"].items() if not k.startswith(benchmarks.UPSTREAM)}
        assert kept == ours
        beside = [v["value"] for k, v in result["metrics"].items() if k.startswith(benchmarks.UPSTREAM)]
        assert set(beside) <= {None}


def upstream_scoring_that_fails(name: str) -> Any:
    """`corrected_config` of a task of lmms-eval one function of which, by its name, fails."""
    from svl.evaluation.upstream_scoring import corrected_config

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("no")

    def broken(original: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        if original["process_results"].__name__ == name:
            original = {**original, "process_results": fail}
        entries = [
            {**entry, "aggregation": fail} if getattr(entry["aggregation"], "__name__", "") == name else entry
            for entry in original["metric_list"]
        ]
        return corrected_config({**original, "metric_list": entries}, own)

    return broken
