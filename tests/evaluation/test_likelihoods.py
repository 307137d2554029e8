"""Tasks that ask how likely given answers are: the reference is a plain forward pass of each."""

from __future__ import annotations

import importlib
import json
import math
import statistics

import pytest
import torch
from helpers.tasks import benchmark, score_task, script, task_folder
from PIL import Image

import svl
from svl.core import Plan, SvlError
from svl.evaluation.settings import TaskOptions
from svl.models.prompts import with_prompt_style
from svl.pruning.surgery import apply

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluation.evaluate")
read_task_config = importlib.import_module("svl.evaluation.lmms_tasks").read_task_config


def test_likelihoods(llava, tmp_path, monkeypatch):
    """A multiple-choice task by likelihood: the choice of a plain forward pass over each question, one by one."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [
        {"q": f"what is {word} there", "options": ["red", "green blue", "round"], "gold": i % 3}
        for i, word in enumerate(["left", "right of the gray square", "in"])
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
        "doc_to_visual: !function see.picture\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "see.py").write_text(
        "from PIL import Image\n"
        "def picture(doc):\n    return [Image.new('RGB', (16, 16), (200, 30, 9 * len(doc['q'])))]\n"
    )
    found = {}
    for size in (1, 8):
        result, rows = score_task(llava, "likely", tmp_path, include_path=str(tmp_path), metric="acc", batch_size=size)
        found[size] = (result["metrics"], [row["prediction"] for row in rows])
    assert found[1] == found[8]

    for document, prediction in zip(documents, found[1][1], strict=True):
        image = Image.new("RGB", (16, 16), (200, 30, 9 * len(document["q"])))
        prompt, losses = llava.prompt(document["q"], images=1), []
        for option in document["options"]:
            inputs, n = llava.encode([f"{prompt} {option}"], [[image]]), len(option.split())
            with torch.inference_mode():
                predicted = llava.model(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
            losses.append(-sum(predicted[k, inputs["input_ids"][0, k - n]].item() for k in range(n)))
        assert prediction == document["options"][losses.index(min(losses))]
    truth = [document["options"][document["gold"]] for document in documents]
    right = [float(a == b) for a, b in zip(truth, found[1][1], strict=True)]
    assert found[1][0]["acc"]["value"] == pytest.approx(statistics.fmean(right))


def test_one_likelihood_each(llava, tmp_path, monkeypatch):
    """Tasks of type `loglikelihood`: how likely the target is, and whether greedy decoding would give it."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["red", "green blue", "round", "left"]
    documents = [{"q": f"what is {word} there", "a": word} for word in words]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: !function see.target\n"
        "doc_to_visual: !function see.picture\n"
        "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "see.py").write_text(
        "from PIL import Image\n"
        "def picture(doc):\n    return [Image.new('RGB', (16, 16), (200, 30, 9 * len(doc['q'])))]\n"
        "def target(doc):\n    return doc['a']\n"
    )
    result, _ = score_task(llava, "likely", tmp_path, include_path=str(tmp_path), metric="acc", batch_size=3)
    losses, greedy = [], []
    for document in documents:
        image = Image.new("RGB", (16, 16), (200, 30, 9 * len(document["q"])))
        prompt, n = llava.prompt(document["q"], images=1), len(document["a"].split())
        inputs = llava.encode([f"{prompt} {document['a']}"], [[image]])
        with torch.inference_mode():
            predicted = llava.model(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
        target = inputs["input_ids"][0, -n:]
        losses.append(-predicted.gather(1, target[:, None]).sum().item())
        greedy.append(float((predicted.argmax(-1) == target).all()))
    assert result["metrics"]["acc"]["value"] == statistics.fmean(greedy)
    # lmms-eval's "perplexity" is exp(-mean) of what it takes for a log-likelihood, and gets a loss
    assert abs(math.log(result["metrics"]["perplexity"]["value"])) == pytest.approx(statistics.fmean(losses), rel=1e-4)


def token_by_token(lvlm, inputs, target) -> list[float]:
    """Log-likelihoods of the tokens `target` after a prompt, as generation comes to them: one at a time, by a cache."""
    found, seen = [], dict(inputs)
    with torch.inference_mode():
        output = lvlm.model(**seen, use_cache=True)
        for n, token in enumerate(target, 1):
            found.append(output.logits[0, -1].log_softmax(-1)[token].item())
            mask = torch.cat([inputs["attention_mask"], torch.ones(1, n, dtype=torch.long)], 1)
            one = token.reshape(1, 1)
            output = lvlm.model(
                input_ids=one, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
            )
    return found


def test_likelihoods_of_a_model_that_reads_prompts_both_ways(mimic, tmp_path, monkeypatch):
    """PaliGemma: no token of an option is known before it is predicted, in a batch as alone."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    lvlm = with_prompt_style(svl.load(mimic("paligemma2_3b"), device="cpu", dtype="float32"), "paligemma")
    words = ["red", "green blue", "a round one", "left"]
    documents = [{"q": f"what is {word} there", "a": word} for word in words]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: a\ndoc_to_visual: !function see.picture\n"
        "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    )
    (tmp_path / "see.py").write_text(
        "from PIL import Image\n"
        "def picture(doc):\n    return [Image.new('RGB', (28, 28), (200, 30, 9 * len(doc['q'])))]\n"
    )
    losses = []
    for document in documents:
        image = Image.new("RGB", (28, 28), (200, 30, 9 * len(document["q"])))
        prompt = lvlm.prompt(document["q"], images=1)
        asked, whole = (lvlm.encode([text], [[image]]) for text in (prompt, f"{prompt} {document['a']}"))
        target = whole["input_ids"][0, asked["input_ids"].shape[1] :]
        assert lvlm.tokenizer.decode(target).strip() == document["a"]
        losses.append(-sum(token_by_token(lvlm, asked, target)))
    for size in (1, 4):
        options = {"include_path": str(tmp_path), "metric": "perplexity", "batch_size": size}
        result, _ = score_task(lvlm, "likely", tmp_path, **options)
        found = abs(math.log(result["metrics"]["perplexity"]["value"]))  # see above
        assert found == pytest.approx(statistics.fmean(losses), rel=1e-4)


# --------------------------------------------------------------------------------- besides generated answers


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder with a task of closed questions and an open one, and its documents."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["red", "green", "blue", "round", "left"]
    documents = [
        {
            "prompt": f"what is {words[i]} of the gray square",
            "answer": "A" if i % 2 else "C",
            "n": 2 + i % 3,
            "kind": "x",
        }
        for i in range(5)
    ] + [{"prompt": "what is there", "answer": "red", "n": 0, "kind": "x"}]
    body = (
        "doc_to_visual: !function see.picture\noptions: !function see.options\nprocess_results: !function see.score\n"
        "  - {metric: above_chance, aggregation: !function utils.above_chance, higher_is_better: true, "
        "parts: !function utils.above_chance_parts}\n"
        "  - {metric: off_format, aggregation: !function utils.accuracy, higher_is_better: false}\n"
    )
    head, _, metrics = body.partition("  - ")
    folder = task_folder(tmp_path / "closed", f"  - {metrics}{head}", documents)
    (tmp_path / "closed" / "see.py").write_text(
        "from PIL import Image\n"
        "from svl.evaluation.answer_items import choice_items, lettered, short_items\n"
        "def picture(doc):\n    return [Image.new('RGB', (16, 16), (200, 30, 9 * len(doc['prompt'])))]\n"
        "def options(doc):\n    return ['red', 'green', 'blue', 'round'][:doc['n']]\n"
        "def score(doc, results):\n"
        "    if not doc['n']:\n        return short_items(results[0], doc['answer'])\n"
        "    return choice_items(results[0], lettered(options(doc)), doc['answer'])\n"
    )
    return folder, documents


def likeliest(lvlm, document):
    """The option that one plain forward pass each finds likeliest."""
    image = Image.new("RGB", (16, 16), (200, 30, 9 * len(document["prompt"])))
    prompt, losses = lvlm.prompt(document["prompt"], images=1), []
    for option in ["red", "green", "blue", "round"][: document["n"]]:
        inputs = lvlm.encode([f"{prompt} {option}"], [[image]])
        with torch.inference_mode():
            predicted = lvlm.model(**inputs).logits[0, -2].log_softmax(-1)
        losses.append(-predicted[inputs["input_ids"][0, -1]].item())
    return "ABCD"[losses.index(min(losses))]


def test_options_of_questions_with_generated_answers(llava, closed, tmp_path):
    """Beside answers that stay the same: what they would count if the likeliest options were the answers."""
    folder, documents = closed
    plain, rows = score_task(llava, "custom", tmp_path, include_path=folder, max_new_tokens=3)
    assert not any("likelihood" in name for name in plain["metrics"])
    for size in (1, 8):
        result, same = score_task(
            llava, "custom", tmp_path, include_path=folder, max_new_tokens=3, likelihood=True, batch_size=size
        )
        assert same == rows
        assert {name: m for name, m in result["metrics"].items() if "likelihood" not in name} == plain["metrics"]
        right = [likeliest(llava, d) == d["answer"] for d in documents if d["n"]]
        found = result["metrics"]["likelihood_accuracy"]
        assert found["value"] == pytest.approx(statistics.fmean(right))
        assert found["stderr"] == pytest.approx(statistics.stdev(map(float, right)) / 5**0.5)
        chance = statistics.fmean(1 / d["n"] for d in documents if d["n"])
        assert result["metrics"]["likelihood_above_chance"]["value"] == pytest.approx(
            (statistics.fmean(right) - chance) / (1 - chance)
        )
        assert "likelihood_off_format" not in result["metrics"]


def test_likelihoods_of_models_together_are_those_alone(llava, closed, tmp_path):
    folder, _ = closed
    models = [llava, apply(llava, Plan(4, (3,))), apply(llava, Plan(4, (1,)))]
    options = TaskOptions("accuracy", include_path=folder, max_new_tokens=3, likelihood=True, batch_size=4)
    folders = [tmp_path / name for name in "abc"]
    for place in folders:
        place.mkdir()
    together = evaluation.evaluate_together(models, "custom", options, folders)
    alone = [evaluation.evaluate(model, "custom", options, tmp_path) for model in models]
    assert [found["metrics"] for found in together] == [found["metrics"] for found in alone]


def test_a_likelihood_as_the_main_metric(llava, closed, tmp_path):
    folder, documents = closed
    chosen = {"include_path": folder, "metric": "likelihood_accuracy", "max_new_tokens": 3}
    with pytest.raises(SvlError, match="must be one of: accuracy, above_chance, off_format"):
        score_task(llava, "custom", tmp_path, **chosen)
    result, rows = score_task(llava, "custom", tmp_path, likelihood=True, **chosen)
    right = [likeliest(llava, d) == d["answer"] for d in documents if d["n"]]
    assert [row["score"] for row in rows] == [*right, None]  # an open question has no options
    assert set(right) == {True, False}
    assert result["metrics"]["likelihood_accuracy"]["value"] == pytest.approx(statistics.fmean(right))


def test_a_likelihood_that_is_no_number_is_no_choice():
    likeliest = importlib.import_module("svl.evaluation.lmms_eval_internals").likeliest
    assert likeliest("ABC", [(2.0, False), (1.0, False), (1.0, True)]) == "B"
    assert likeliest("AB", [(math.inf, False), (3.0, False)]) == "B"
    for losses in ((math.nan, 1.0), (1.0, math.nan)):
        with pytest.raises(SvlError, match=r"logits are not finite, .* try another model\.dtype"):
            likeliest("AB", [(loss, False) for loss in losses])


def test_public_benchmarks_compare_the_options_that_their_prompts_ask_for():
    """Every option reads as itself, and the right one is right, in every benchmark with closed questions."""
    standins = script("make_standins")
    tables = {name: getattr(standins, name)()[1] for name in ("pope", "mme", "scienceqa", "aokvqa", "mmbench")}
    tables |= {name: getattr(standins, name)()[1] for name in ("seedbench", "mmstar", "ai2d")}
    for name, rows in tables.items():
        settings = read_task_config(f"svl_{name}", None)
        for row in rows:
            asked = settings["options"](row)
            assert 2 <= len(asked) <= 5
            scored = [settings["process_results"](dict(row), [option]) for option in asked]
            main = benchmark(name).tasks[f"svl_{name}"].metric
            items = [found.get("accuracy" if name == "pope" else main) or found["cognition"] for found in scored]
            assert [item["score"] for item in items].count(1) == 1
            assert not any(found["off_format"]["score"] for found in scored)
            assert all(found["above_chance"]["chance"] == 1 / len(asked) for found in scored if "above_chance" in found)
