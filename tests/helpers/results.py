"""Results of runs as a store holds them, for tests of reports."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

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


def demo(store):
    """Two methods at two ratios, one of them with three seeds."""
    store.add(result(ratio=0.125, level=0.7), result(ratio=0.25, level=0.6), files=example)
    store.add(result("last_n", 0.125, 0.75), result("last_n", 0.25, 0.5, selector=None, compensation=None))
    store.add(*(result("random", 0.25, level, seed) for seed, level in enumerate((0.3, 0.4, 0.5))))


def table_cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
