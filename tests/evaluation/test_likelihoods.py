"""Tasks that ask how likely given answers are: the reference is a plain forward pass of each."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from helpers.tasks import score_task
from PIL import Image

pytest.importorskip("lmms_eval")


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
        prompt, losses = llava.prompt(document["q"], image=True), []
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
        prompt, n = llava.prompt(document["q"], image=True), len(document["a"].split())
        inputs = llava.encode([f"{prompt} {document['a']}"], [[image]])
        with torch.inference_mode():
            predicted = llava.model(**inputs).logits[0, -n - 1 : -1].log_softmax(-1)
        target = inputs["input_ids"][0, -n:]
        losses.append(-predicted.gather(1, target[:, None]).sum().item())
        greedy.append(float((predicted.argmax(-1) == target).all()))
    assert result["metrics"]["acc"]["value"] == statistics.fmean(greedy)
    # lmms-eval's "perplexity" is exp(-mean) of what it takes for a log-likelihood, and gets a loss
    assert abs(math.log(result["metrics"]["perplexity"]["value"])) == pytest.approx(statistics.fmean(losses), rel=1e-4)
