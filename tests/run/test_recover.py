"""The stage recover: in the store under its own key, gone on with after a kill, in results, exports and reports."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.commands import QUIET, SMALL, read, run_svl
from helpers.paths import ROOT
from hydra import compose, initialize_config_dir

from svl import config
from svl.core import Plan
from svl.run import recovering
from svl.run.setup import RunSetup
from svl.store.artifacts import Store

pytest.importorskip("lmms_eval")
pytest.importorskip("peft")

PRUNE = ("strategy=manual", "strategy.layers=[5,6,9,12]", "selector=all", "compensation=none", *QUIET, *SMALL)
TEXTS = "${svl:demo}/text/calibration.jsonl"
TRAIN = ("recovery.batch_size=2", "recovery.learning_rate=1e-3", "recovery.layers=gaps")
STOCK = """
import sys
sys.modules["peft"] = sys.modules["svl"] = None
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(5, 25)[None]
torch.save(model(input_ids=ids).logits, sys.argv[2])
"""


@pytest.mark.parametrize(("recovery", "reads"), [("projector", False), ("interlace", True)])
def test_partners_that_a_plan_names_count_where_they_are_read(recovery, reads, tmp_path):
    words = (f"recovery={recovery}", "benchmark=none", "tracker=none", "calibration.samples=2")
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        setup = RunSetup(compose("config", overrides=[*words, f"paths.store={tmp_path}"]))
    plain, named = Plan(16, (5, 6)), Plan(16, (5, 6), provenance={"partners": [3, 8]})
    inputs = [recovering.training_inputs(setup, plan, None) for plan in (plain, named)]
    assert (inputs[0] != inputs[1]) == reads


@pytest.mark.parametrize(("samples", "told"), [(20, "rows [0, 1, 2"), (23, "the first 20 in rows [0, 1, 2")])
def test_a_long_list_of_shared_pictures_is_told_as_its_beginning(samples, told, tmp_path, caplog):
    """Trained on the benchmark's own pictures, under other questions."""
    rows = pyarrow.parquet.read_table(ROOT / "svl/demo/data/open.parquet").slice(0, samples).to_pylist()
    mine = [{"prompt": "What?", "answer": "It.", "image": row["image"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(mine), tmp_path / "mine.parquet")
    words = ("recovery=lora", "benchmark=demo", "benchmark.limit=30", "tracker=none", "calibration.samples=2")
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        data = (f"recovery.data.path={tmp_path / 'mine.parquet'}", f"paths.store={tmp_path / 'store'}")
        setup = RunSetup(compose("config", overrides=[*words, *data]))
    recovering.compare_pictures(setup, Plan(16, (5, 6)))
    (record,) = [r.getMessage() for r in caplog.records if "picture of a benchmark" in r.getMessage()]
    assert f"{samples} samples have a picture of a benchmark, {told}" in record
    assert record.endswith(", 18, 19]")


def last_run(folder: Path) -> tuple[dict, dict, str]:
    return read(max((folder / "out").glob("*/*")))


def trained_file(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in store.glob("recover/*/trained.safetensors")]


def test_a_run_trains_once_and_exports_a_stock_checkpoint(tmp_path):
    """LoRA is merged: what is exported loads without peft and svl, and computes what the run evaluated."""
    import torch

    import svl
    from svl.core import Patch
    from svl.pruning.patch_file import load_trained

    words = (*PRUNE, "recovery=distill", "recovery.steps=3", *TRAIN, "export.path=exported")
    shown = run_svl(*words, cwd=tmp_path).stdout
    _, result, _ = last_run(tmp_path)
    assert re.search(r"recover +[\d.]+ s +trained [\d.]+ M parameters: 3 steps, 6 samples", shown)
    spent = result["training"]
    assert (result["recovery"], spent["steps"], spent["samples"], spent["shared_pictures"]) == ("distill", 3, 6, 0)
    assert spent["tokens"] > 6 * 20
    assert spent["device"]["type"] == "cpu"
    assert result["settings"]["recovery"]["samples"] == 4
    assert not list((tmp_path / "store" / "unfinished").iterdir())
    curve = next(Store(tmp_path / "store").entries("recover")).output["curve"]
    assert [sorted(point) for point in curve] == [["answers", "learning_rate", "loss", "seconds", "states", "step"]] * 3

    subprocess.run([sys.executable, "-c", STOCK, "exported", "logits"], cwd=tmp_path, check=True, timeout=120)
    plan = Plan.from_json((max((tmp_path / "out").glob("*/*")) / "plan.json").read_text())
    (file,) = (tmp_path / "store").glob("recover/*/trained.safetensors")
    dense = svl.load(ROOT / "svl/demo/demo_lvlm", device="cpu")
    pruned = svl.apply(dense, plan, Patch(trained=load_trained(file)))
    with torch.no_grad():
        expected = pruned.model(input_ids=torch.arange(5, 25)[None]).logits
        untrained = svl.apply(dense, plan).model(input_ids=torch.arange(5, 25)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, atol=1e-5, rtol=1e-5)
    assert (expected - untrained).abs().max() > 1e-3
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| training | 3 steps, 6 samples" in card

    again = run_svl(*words[:-1], "recovery.save_every=9", cwd=tmp_path).stdout  # which changes no result
    assert re.search("stored .*recover", again)
    other = run_svl(*words[:-1], "recovery.steps=0", cwd=tmp_path).stdout
    assert re.search("recover .* 0 steps, 0 samples, 0 tokens", other)
    assert len(trained_file(tmp_path / "store")) == 1  # no training, no tensors


def test_a_run_that_is_killed_ends_in_the_same_weights(fork_server, tmp_path):
    """SIGKILL at random changes of the disk, most of them in training; each run goes on from the last checkpoint."""
    words = (*PRUNE[:-4], *SMALL, "benchmark=none", "tracker=none", "recovery=lora", "recovery.steps=8", *TRAIN)
    words += ("recovery.save_every=2", "paths.outputs=out")
    run = fork_server.start(*words, "paths.store=alone", cwd=tmp_path)
    assert fork_server.wait(run) == 0, fork_server.log(run)
    events, chance, kills = fork_server.events(run), random.Random(2), 0
    steps: set[str] = set()
    while kills < 4:
        at = chance.randint(events // 3, events - 1)
        run = fork_server.start(*words, "paths.store=store", cwd=tmp_path, last_event=at)
        ended = fork_server.wait(run)
        assert ended in (0, -signal.SIGKILL), fork_server.log(run)
        kills += ended != 0
        steps |= {path.name for path in (tmp_path / "store").glob("unfinished/*/step-*")}
        if ended == 0:
            break
    assert steps  # some run was killed with a checkpoint behind it
    run = fork_server.start(*words, "paths.store=store", cwd=tmp_path)
    assert fork_server.wait(run) == 0, fork_server.log(run)
    assert trained_file(tmp_path / "store") == trained_file(tmp_path / "alone")
    assert len(trained_file(tmp_path / "store")) == 1
    assert not list((tmp_path / "store").glob("unfinished/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recovery.data.pth=x"], "there is no setting 'recovery.data.pth' (did you mean 'recovery.data.path'?)"),
        (["recovery.data.samples=many"], "setting 'recovery.data.samples'"),
        (["recovery.data.samples=4"], "recovery.data.samples has no effect: without recovery.data.path"),
        (
            ["recovery.data.path=x.jsonl", "recovery.data.samples=0"],
            "recovery.data.samples is 0, but must be",
        ),
        (
            [f"recovery.data.path={TEXTS}", "recovery.data.columns={text: body}"],
            "recovery.data.columns names 'body', but there is no such column",
        ),
        (["recovery.data.path=calibration.jsonl"], "'calibration.jsonl'"),
        (
            ["recovery.data=x.jsonl"],
            "recovery.data is 'x.jsonl', but must be a mapping: set recovery.data.path=x.jsonl",
        ),
        *(
            ([f"recovery.data.path={TEXTS}", f"recovery.data.{setting}"], message)
            for setting, message in (
                ("batch_size=4", "recovery.data.batch_size has no effect: training takes recovery.batch_size"),
                ("statistics=[cosine]", "recovery.data.statistics has no effect: nothing is measured"),
                ("generated=3", "recovery.data.generated has no effect: recovery writes no texts"),
                ("columns=question", "recovery.data.columns is 'question', but must be a mapping"),
                ("image_table=name", "recovery.data.image_table is 'name', but must be a mapping"),
                ("image_table={nme: x}", "a name in recovery.data.image_table"),
                ("images=WRONG", "recovery.data.images: there is no folder 'WRONG'"),
                ("columns={promt: question}", "a key of recovery.data.columns is 'promt'"),
                ("format=qa", "recovery.data.format is 'qa'"),
                ("turns=last", "recovery.data.turns is 'last'"),
            )
        ),
        (["seed=-1"], "seed is -1, but must be at least 0"),
        (["recovery.learning_rate=inf"], "recovery.learning_rate is inf, but must be a finite number"),
        (["model.offload=true", "benchmark=none"], "model.offload leaves layers on disk: set recovery=none"),
        (["model.dtype=float16"], "recovery trains in float32 or bfloat16"),
        (["recovery.rnk=4"], "recovery has no setting 'rnk' (did you mean 'rank'?)"),
        (
            ["benchmark=demo", "recovery.data.path=${svl:demo}/data/open.parquet"],
            "is what benchmark task 'svl_demo_open' is scored on",
        ),
        (
            ["benchmark=demo", "recovery.data.path=${svl:demo}/data/open.parquet", "recovery.data.format=prompt"],
            "is what benchmark task 'svl_demo_open' is scored on",
        ),
        (
            [f"recovery.data.{word}" for word in ("path=lmms-lab/POPE", "format=question", "samples=4", "split=test")],
            "recovery.data.split: 'test' of POPE is what benchmark task",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(words, message, tmp_path):
    shown = run_svl(*PRUNE, "recovery=lora", *[f"+{w}" if "pth" in w else w for w in words], cwd=tmp_path, code=1)
    assert message in shown.stderr
    assert not (tmp_path / "store" / "stats").exists()


def test_processes_that_cannot_share_a_step_are_refused(tmp_path):
    shown = run_svl(*PRUNE, "recovery=lora", cwd=tmp_path, code=1, WORLD_SIZE="2", RANK="0")
    assert "2 processes share the passes of a step, but recovery.accumulate is 1: set it to a multiple" in shown.stderr


def test_runs_on_other_samples_are_rows_of_their_own(tmp_path):
    """Other draws from one file; nothing but what they were trained on tells them apart."""
    from helpers.commands import run_command

    from svl.report.command import main

    (tmp_path / "mine.jsonl").write_text("".join(f'{{"prompt": "Say {i}", "answer": "{i}"}}\n' for i in range(9)))
    for seed in (0, 1):
        data = ("recovery.data.path=mine.jsonl", "recovery.data.samples=3", f"recovery.data.seed={seed}")
        data += ("recovery.data.columns={image: null}",)
        few = ("recovery=lora", "recovery.steps=1", "recovery.batch_size=2", "benchmark=prose", "benchmark.limit=2")
        run_svl(*PRUNE, *few, *data, "name=draws", cwd=tmp_path)
    run_command(main, "experiment=draws", "store=store", "out=report", cwd=tmp_path)
    lines = (tmp_path / "report" / "table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| manual")]) == 2


def test_the_budget_is_in_tables_and_numbers(tmp_path):
    """Beside the score of every row; a run without recovery has spent nothing."""
    from svl.report.command import main

    few = ("benchmark=demo", "benchmark.limit=2", "benchmark.batch_size=2", "name=budget")
    for recovery in ("none", "projector"):
        extra = () if recovery == "none" else ("recovery.steps=2", "recovery.batch_size=3")
        run_svl(*PRUNE, *few, f"recovery={recovery}", *extra, cwd=tmp_path)
    from helpers.commands import run_command

    run_command(main, "experiment=budget", "store=store", "out=report", cwd=tmp_path)
    text = (tmp_path / "report" / "table.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| strategy"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    rows = [
        dict(zip(columns, (cell.strip(" *") for cell in line.strip("|").split("|")), strict=True))
        for line in text.splitlines()
        if line.startswith("| manual")
    ]
    assert sorted((row["training steps"], row["training samples"]) for row in rows) == [("0", "0"), ("2", "6")]
    assert {row["strategy"] for row in rows} == {"manual (recovery=none)", "manual (projector)"}
    assert "No picture of the benchmarks is among those trained on" in text
    numbers = (tmp_path / "report" / "results.csv").read_text()
    assert re.search(r",projector,.*training,,samples,0,,6", numbers)
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "out").glob("*/*/result.json"))]
    assert results[-1]["training"]["steps"] == 2
    # What a run without recovery records, and keys of speeds hold, stays as it is.
    assert results[1]["versions"].keys() - results[0]["versions"].keys() == {"peft", "accelerate"}
