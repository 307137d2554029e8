"""Scoring of the benchmarks that svl corrects (docs/benchmarks.md says what and why), as lmms-eval task code.

`process_results` functions give one item per metric (svl.evaluation.answer_items), aggregations and `parts` functions
take the items of all rows (svl.evaluation.task_metrics). Answers are read by svl.evaluation.reading; of short ones,
what a strict script accepts as it stands counts, too. `..._options` functions give what a closed question may be
answered with.
"""

from __future__ import annotations

import ast
from typing import Any

from svl.core import SvlError
from svl.data.pictures import open_picture
from svl.evaluation.answer_items import (
    Item,
    agree,
    choice_items,
    lettered,
    listed_options,
    off_format,
    read_as,
    read_as_people,
    scored,
    short_items,
    yes_no_items,
)
from svl.evaluation.reading import LETTERS, read_number, read_short_answer, same_answer
from svl.evaluation.task_metrics import (
    above_chance,
    above_chance_parts,
    accuracy,
    circular_above_chance,
    circular_above_chance_parts,
    circular_accuracy,
    circular_parts,
    count,
    count_f1,
    count_positives,
    count_questions,
    count_said_yes,
    f1,
    f1_parts,
    f1_splits,
    f1_splits_parts,
    mme_above_chance,
    mme_above_chance_parts,
    mme_parts,
    mme_score,
    precision,
    precision_parts,
    recall,
    recall_parts,
    yes_ratio,
    yes_ratio_parts,
)

# what the YAML files name besides the functions below
__all__ = [
    "above_chance",
    "above_chance_parts",
    "accuracy",
    "circular_above_chance",
    "circular_above_chance_parts",
    "circular_accuracy",
    "circular_parts",
    "count",
    "count_f1",
    "count_positives",
    "count_questions",
    "count_said_yes",
    "f1",
    "f1_parts",
    "f1_splits",
    "f1_splits_parts",
    "mme_above_chance",
    "mme_above_chance_parts",
    "mme_parts",
    "mme_score",
    "precision",
    "precision_parts",
    "recall",
    "recall_parts",
    "yes_ratio",
    "yes_ratio_parts",
]

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOLERANCE = 0.05  # of numbers, as a share of what is right (relaxed accuracy)


# ------------------------------------------------------------------------------------- yes or no: POPE, MME


def pope(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Items of a yes-or-no question; besides, the F1 score as others have it.

    `f1_splits` is the mean over random, popular and adversarial questions; `f1_official` is read by POPE's own script,
    over all questions; `f1_llava` by LLaVA's eval_pope.py, the same rule, which is reported by split: their mean.
    """
    items = yes_no_items(results[0], doc["answer"])
    by_script = scored(pope_script_answer(results[0]), items["f1"]["target"], target=items["f1"]["target"])
    split = {"split": doc.get("category")}
    return {
        **items,
        "f1_splits": {**items["f1"], **split},
        "f1_official": by_script,
        "f1_llava": {**by_script, **split},
    }


def pope_script_answer(text: str) -> str:
    """What the scripts of POPE and LLaVA take an answer for: "no" if its first sentence says so, else "yes"."""
    words = text.strip().partition(".")[0].replace(",", "").split(" ")  # answers files hold no white space around
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_options(doc: dict[str, Any]) -> list[str]:
    """The two answers to a question of POPE or MME."""
    return ["Yes", "No"]


def mme(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """An item for `perception` (with `above_chance`) or `cognition`, for `total`, and for the form."""
    items = yes_no_items(results[0], doc["answer"], pair=str(doc["question_id"]), category=doc["category"])
    found = {"total": items["accuracy"], "off_format": items["off_format"]}
    if doc["category"] in COGNITION:
        return {"cognition": items["accuracy"], **found}
    return {"perception": items["accuracy"], "above_chance": items["above_chance"], **found}


def mme_pair(doc: dict[str, Any]) -> str:
    """What the two questions on one image have in common."""
    return f"{doc['category']}/{doc['question_id']}"


# ---------------------------------------------------------------------------------------- multiple choice


def aokvqa_prompt(doc: dict[str, Any], settings: dict[str, str]) -> str:
    """Question and lettered choices."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in lettered(doc["choices"]).items())
    return f"{settings['pre_prompt']}{doc['question']}\n{choices}{settings['post_prompt']}"


def aokvqa_target(doc: dict[str, Any]) -> str:
    """The letter of the right choice."""
    return LETTERS[doc["correct_choice_idx"]]


def aokvqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of A-OKVQA."""
    return choice_items(results[0], lettered(doc["choices"]), aokvqa_target(doc))


def choices_options(doc: dict[str, Any]) -> list[str]:
    """The letters of A-OKVQA and ScienceQA."""
    return list(lettered(doc["choices"]))


def scienceqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of ScienceQA."""
    return choice_items(results[0], lettered(doc["choices"]), LETTERS[doc["answer"]], "exact_match")


def ai2d(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of AI2D; lmms-eval's own metric takes "B" and "B. ..." ."""
    target, text = LETTERS[int(doc["answer"])], results[0]
    as_upstream = text[0] if text[1:2] == "." and text[0].isupper() else text
    return {
        **choice_items(text, lettered(doc["options"]), target, "exact_match"),
        "upstream_exact_match": _upstream_exact_match(as_upstream, target),
    }


def ai2d_options(doc: dict[str, Any]) -> list[str]:
    """The letters of AI2D."""
    return list(lettered(doc["options"]))


def image(doc: dict[str, Any]) -> list[Any]:
    """The document's one image."""
    return [open_picture(doc["image"])]


def numbered(dataset: Any) -> Any:
    """MMBench with whole numbers as indices, which some copies have as text."""
    from datasets import Value

    if dataset.features["index"].dtype != "string":
        return dataset
    return dataset.cast_column("index", Value("int64"))


def mmbench_question(doc: dict[str, Any]) -> int:
    """What the rotations of one question have in common (their indices differ by millions)."""
    return int(doc["index"]) % 1_000_000


def mmbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One rotation of a question."""
    options = {letter: doc[letter] for letter in mmbench_options(doc)}
    return choice_items(results[0], options, doc["answer"], question=mmbench_question(doc))


def mmbench_options(doc: dict[str, Any]) -> list[str]:
    """The letters of a question's options, two to five."""
    return [letter for letter in "ABCDE" if doc.get(letter) and str(doc[letter]) != "nan"]


def images_only(dataset: Any) -> Any:
    """The rows of SEED-Bench that show an image, not frames of a video."""
    return dataset.filter(lambda kind: kind == "image", input_columns="data_type")


def seedbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of SEED-Bench."""
    options = lettered([doc[f"choice_{c}"] for c in "abcd"])
    return choice_items(results[0], options, doc["answer"].strip().upper())


def four_letters(doc: dict[str, Any]) -> list[str]:
    """The letters of SEED-Bench, MMStar and Video-MME."""
    return list("ABCD")


def videomme(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of Video-MME, whose options are written with their letters."""
    options = {**dict.fromkeys("ABCD"), **listed_options("\n".join(doc["options"]))}
    return choice_items(results[0], options, doc["answer"].strip().upper())


def mvbench(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of MVBench, whose answer is one of the candidates."""
    options = lettered(doc["candidates"])
    target = next((letter for letter, text in options.items() if text == doc["answer"]), None)
    if target is None:
        raise SvlError(f"the answer '{doc['answer']}' is none of the candidates {doc['candidates']}")
    return choice_items(results[0], options, target, labels=("({})", "{}."))


def mvbench_options(doc: dict[str, Any]) -> list[str]:
    """The candidates' letters, in brackets as the question has them."""
    return [f"({letter})" for letter in lettered(doc["candidates"])]


def mmstar(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice of MMStar, whose options are part of the question's text."""
    return choice_items(results[0], dict.fromkeys("ABCD"), doc["answer"].strip().upper())


def realworldqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """A letter where the answer is one, else a word or number."""
    if letters := realworldqa_options(doc):
        options = {**dict.fromkeys(letters), **listed_options(doc["question"])}
        return choice_items(results[0], options, doc["answer"].strip())
    return short_items(results[0], doc["answer"])


def realworldqa_options(doc: dict[str, Any]) -> list[str]:
    """The letters that a question lists (else A to D) where its answer is one."""
    listed = listed_options(doc["question"])
    if doc["answer"].strip() not in tuple("ABCD"):
        return []
    return list(listed) if doc["answer"].strip() in listed else list("ABCD")


def mmmu(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Multiple choice as everywhere here; open questions by MMMU's own rule, as lmms-eval has it."""
    if mmmu_options(doc):
        return choice_items(results[0], lettered(ast.literal_eval(doc["options"])), doc["answer"])
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    target = doc["answer"]
    if target.startswith("["):
        target = ast.literal_eval(target)
    readings = [results[0], read_short_answer(results[0]) or ""]
    strict, read = (float(bool(eval_open(target, parse_open_response(text)))) for text in readings)
    found = {"score": max(strict, read), "answer": results[0]}
    return {"accuracy": found, **_form_of(found, strict, results[0])}


def mmmu_options(doc: dict[str, Any]) -> list[str]:
    """The letters of a multiple-choice question."""
    if doc["question_type"] != "multiple-choice":
        return []
    return list(lettered(ast.literal_eval(doc["options"])))


# ------------------------------------------------------------------------------------------ short answers


def _upstream_exact_match(text: str, target: str) -> Item:
    """What lmms-eval's `exact_match` makes of an answer, but for case and punctuation."""
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    found = exact_match_hf_evaluate([text], [target], ignore_case=True, ignore_punctuation=True)
    return {"score": float(found["exact_match"]), "answer": text}


def gqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """One word or phrase, exactly, but for case, punctuation, and an article."""
    items, strict = (
        short_items(results[0], doc["answer"], "exact_match"),
        _upstream_exact_match(results[0], doc["answer"]),
    )
    items["exact_match"]["score"] = max(items["exact_match"]["score"], strict["score"])
    return {**items, "upstream_exact_match": strict}


def vqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """VQA accuracy of TextVQA and VizWiz: how many of the other people agree, at most three, left out one by one."""
    from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor

    process, text = EvalAIAnswerProcessor(), results[0]
    given = [process(answer) for answer in doc["answers"]]

    def agreement(answer: str) -> float:
        others = [given.count(process(answer)) - (own == process(answer)) for own in given]
        return sum(min(1, n / 3) for n in others) / len(given)

    strict = agreement(text)
    answer = max(sorted(read_as_people(text, doc["answers"])), key=agreement)
    found = {"score": max(strict, agreement(answer)), "answer": answer}
    return {"exact_match": found, **_form_of(found, strict, text)}


def _form_of(found: Item, strict: float, text: str) -> dict[str, Item]:
    """The item of the form of an answer in one's own words, which a strict rule may accept as it stands."""
    items = off_format(text, read_short_answer(text))
    if found["score"] > strict:
        items["off_format"]["score"] = 1.0
    return items


def docvqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """ANLS: how similar the answer is to the nearest right one, from a half on."""
    from lmms_eval.api.metrics import anls

    answer = read_short_answer(results[0])
    strict, read = (float(anls(doc["answers"], [text])["anls"]) for text in (results[0], answer or ""))
    found = {"score": max(strict, read), "answer": answer}
    return {
        "anls": found,
        "upstream_anls": {"score": strict, "answer": results[0]},
        **_form_of(found, strict, results[0]),
    }


def chartqa(doc: dict[str, Any], results: list[str]) -> dict[str, Item]:
    """Relaxed accuracy: numbers within 5 %, other answers exactly."""
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    text, target = results[0], doc["answer"]
    found = {"score": float(is_relaxed_match(text, target)), "answer": read_as(text, target)}
    split = "relaxed_human_split" if doc["type"] == "human_test" else "relaxed_augmented_split"
    strict = float(relaxed_correctness(text, target))
    return {"relaxed_overall": found, split: found, **_form_of(found, strict, text)}


def is_relaxed_match(text: str, target: str) -> bool:
    """Whether an answer is right by ChartQA's rule, as it stands or as it is read; a unit may be left out."""
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    answer = read_as(text, target) or ""
    if relaxed_correctness(text, target) or relaxed_correctness(answer, target) or same_answer(answer, target):
        return True
    found, right = read_number(text, [target]), read_number(target, [target])
    if found is None or right is None or not agree(found.unit, right.unit):
        return False
    return abs(found.value - right.value) <= TOLERANCE * abs(right.value)
