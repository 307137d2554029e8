"""A finished run as trackers get it, and what W&B wrote of one, read back record by record."""

import json
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record as Stored
from wandb.sdk.internal.datastore import DataStore

PLAN = {"n_layers": 4, "removed": [2], "kept": [0, 1, 3], "importance": [0.9, 0.3, 0.1, 0.5]}

RESULT: dict[str, Any] = {
    "name": "demo",
    "seed": 7,
    "limit": None,
    "ratio": 0.26,
    "n_remove": 1,
    "plan": PLAN,
    "cost": {"params": 6, "params_dense": 8, "layers": 3, "samples_per_second": None},
    "scores": {
        "yes": {
            "metric": "accuracy",
            "n": 9,
            "metrics": {
                "accuracy": {"value": 0.75, "stderr": 0.15, "dense": 0.875, "low": 0.375, "high": 0.9375},
                "f1": {"value": 0.55, "stderr": None, "dense": 0.65},
            },
            "change": {"agreement": 0.45, "gained": 11, "lost": 12, "p": 0.05},
        },
        "no": {"metric": "accuracy", "n": 10, "metrics": {"accuracy": {"value": 0.25, "stderr": 0.35, "dense": 0.85}},
               "change": None},
    },
    "average": {"value": 0.5, "stderr": 0.1, "dense": 0.8},
    "retained": {"value": 0.625, "stderr": 0.02},
    "efficiency": {"dense": {"seconds": {"total": 2.5}}, "speedup": {"total": {"value": 1.25, "low": 1.125}}},
    "seconds": {"calibrate": 1.5, "total": 4.0},
}  # fmt: skip

NUMBERS = {
    "low/yes/accuracy": 0.375, "high/yes/accuracy": 0.9375,
    "eval/yes/accuracy": 0.75, "eval/yes/f1": 0.55, "eval/no/accuracy": 0.25, "eval/average": 0.5,
    "eval/retained": 0.625, "stderr/yes/accuracy": 0.15, "stderr/no/accuracy": 0.35, "stderr/average": 0.1,
    "stderr/retained": 0.02, "dense/yes/accuracy": 0.875, "dense/yes/f1": 0.65, "dense/no/accuracy": 0.85,
    "dense/average": 0.8, "samples/yes": 9, "samples/no": 10, "change/yes/agreement": 0.45, "change/yes/gained": 11,
    "change/yes/lost": 12, "change/yes/p": 0.05, "cost/params": 6, "cost/params_dense": 8, "cost/layers": 3,
    "efficiency/dense/seconds/total": 2.5, "efficiency/speedup/total": 1.25, "efficiency/speedup/total/low": 1.125,
    "prune/ratio": 0.26, "prune/n_remove": 1, "prune/seed": 7, "seconds/calibrate": 1.5, "seconds/total": 4.0,
}  # fmt: skip

CONFIG = {"strategy": {"name": "short_lvlm", "top": [1, 2]}, "ratio": 0.25}

CURVES = {"removed": [0, 0, 1, 0], "importance": PLAN["importance"], "cosine": [0.1, 0.7, 0.9, 0.5]}

TRAINING = [{"step": 1, "loss": 2.5, "seconds": 0.5}, {"step": 2, "loss": 1.25, "seconds": 1.0}]

FLIPS = [{"task": "yes", "no": 3, "question": "Is it?", "expected": "yes", "dense": "no", "pruned": "yes"}]


def read_offline_run(location):
    """All records of an offline run, by kind. Ends W&B's background process first, which writes them."""
    wandb.teardown()
    (file,) = Path(location).glob("*.wandb")
    log = DataStore()
    log.open_for_scan(str(file))
    records: dict[str, list[Any]] = {}
    while (data := log.scan_data()) is not None:
        stored = Stored()
        stored.ParseFromString(data)
        kind = stored.WhichOneof("record_type")
        records.setdefault(kind, []).append(getattr(stored, kind))
    log.close()
    return records


def summary_of(records):
    """The run's summary as W&B will show it."""
    values: dict[str, Any] = {}
    for stored in records["summary"]:
        values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in stored.update}
    return values
