"""The public benchmarks, through lmms-eval's own task code, on stand-ins with the real columns."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from svl import benchmarks, config
from svl.core import SvlError
from svl.tasks import utils

pytest.importorskip("lmms_eval")
evaluation = importlib.import_module("svl.evaluate")
config.register()

ROOT = Path(__file__).parents[1]
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


def benchmark(name: str) -> Any:
    """The composed configuration of conf/benchmark/<name>.yaml."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", overrides=[f"benchmark={name}"]).benchmark


@pytest.fixture(scope="session")
def standins(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("make_standins", ROOT / "scripts" / "make_standins.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write(tmp_path_factory.mktemp("standins"))


@pytest.fixture
def run(llava, standins, tmp_path, monkeypatch):
    """Evaluate one benchmark with answers made by a function of the document -> (result, rows of samples.jsonl)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(standins / "cache"))

    def call(name: str, answer: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def answers(self, requests, cap):
            docs = [self.task_dict[r.args[-2]][r.args[-1]][r.args[-3]] for r in requests]
            for request in requests:
                images = evaluation._images(self._conversation(request))
                assert images
                assert all(image.mode == "RGB" for image in images)
            return [answer(doc) for doc in docs]

        monkeypatch.setattr(evaluation.Answerer, "_batch", answers)
        ((task, chosen),) = benchmark(name).tasks.items()
        settings = {"include_path": None, "data": str(standins), "limit": None, "batch_size": 4, **options}
        settings = {"metric": chosen.metric, "style": chosen.style, "max_new_tokens": None, **settings}
        result = evaluation.evaluate(llava, task, folder=tmp_path, **settings)
        return result, [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    return call


def main(result: dict[str, Any]) -> float:
    return result["metrics"][result["metric"]]["value"]


# ------------------------------------------------------------------------------------------ every benchmark


def test_every_benchmark_is_covered():
    assert set(benchmark("all").tasks) == {task for name in ORACLES for task in benchmark(name).tasks}
    assert set(benchmarks.tasks(benchmarks.OWN)) == set(benchmark("all").tasks)


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_scores_all_its_opposite_and_garbage_nothing(name, run):
    chosen = benchmark(name)
    ((task, settings),) = chosen.tasks.items()
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
    assert bool(upstream) == (name in ("pope", "mme", "mmbench", "seedbench", "mmmu", "realworldqa", "mmstar"))
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
