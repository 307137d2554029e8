"""svl-export as its users run it, and what a process without svl makes of its exports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import digests, some_patch
from helpers.commands import ENVIRONMENT, run_command
from helpers.exports import as_hub_cache, svl_export, write_plan
from helpers.races import another_process
from transformers import AutoModelForCausalLM, AutoProcessor

from svl.checkpoints import export, export_command, safetensors_writing
from svl.checkpoints.model_card import read_card_metadata
from svl.core import Plan
from svl.pruning import patch_file, surgery

READER = """
import io, sys
sys.modules["svl"] = None  # not installed
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

torch.set_num_threads(1)
results = {}
for name, case in torch.load(sys.argv[1], weights_only=False).items():
    auto = AutoModelForImageTextToText if case["images"] else AutoModelForCausalLM
    model, info = auto.from_pretrained(case["path"], output_loading_info=True)
    images = {"images": [Image.open(io.BytesIO(b)).convert("RGB") for b in case["images"]]} if case["images"] else {}
    processor = (AutoProcessor if case["images"] else AutoTokenizer).from_pretrained(case["path"])
    inputs = processor(text=case["texts"], **images, padding=True, padding_side="left", return_tensors="pt",
                       add_special_tokens=False)
    with torch.inference_mode():
        results[name] = {
            "info": {k: sorted(map(str, v)) for k, v in info.items() if v}, "config": model.config.to_dict(),
            "ids": inputs["input_ids"], "logits": model.eval()(**inputs).logits,
            **{cache: model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[*range(9)],
                                     use_cache=cache) for cache in (True, False)},
        }
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def reloaded(request, checkpoint, samples, tmp_path_factory):
    """Exports of all three models by the command, compensated, and what a process without svl makes of them."""
    folder = tmp_path_factory.mktemp("export")
    plan = Plan(4, (0, 2), (0.1, 0.4, 0.2, 0.3), provenance={"strategy": "test", "ratio": 0.5})
    (folder / "plan.json").write_text(plan.to_json())
    cases, pruned = {}, {}
    for kind in ("llava", "qwen", "llama"):
        lvlm = request.getfixturevalue(kind)
        patch = some_patch(lvlm, plan)
        patch_file.save_patch(patch, folder / f"{kind}.patch")
        svl_export("plan=plan.json", f"source={checkpoint(kind)}", f"out={kind}", f"patch={kind}.patch", cwd=folder)
        pruned[kind] = surgery.apply(lvlm, plan, patch)
        cases[kind] = {
            "path": str(folder / kind),
            "texts": [lvlm.prompt(e.prompt, images=lvlm.takes_images) for e in samples.samples[:3]],
            "images": [e.images[0] for e in samples.samples[:3]] if lvlm.takes_images else [],
        }
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-I", "-c", READER, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, plan, pruned, torch.load(folder / "results.pt", weights_only=False)


def test_exports_load_without_svl_and_compute_the_same(lm, reloaded, samples, encode, generate):
    _, plan, pruned, results = reloaded
    result, inputs = results[lm.name], encode(lm, samples.samples[:3])
    assert result["info"] == {}  # no missing, unexpected or mismatched key
    assert torch.equal(result["ids"], inputs["input_ids"])
    present = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = pruned[lm.name].model(**inputs).logits
    torch.testing.assert_close(result["logits"][present], expected[present], atol=1e-5, rtol=0)
    ours = generate(pruned[lm.name].model, inputs).sequences
    assert torch.equal(result[True], ours)
    assert torch.equal(result[False], ours)
    changed = sorted(f"{i}.{role}" for i in (1, 3) for role in ("attn", "mlp"))
    written = {**json.loads(plan.to_json()), "compensated": changed, "key": None}
    assert result["config"]["layer_pruning"] == written


def test_a_plan_written_by_hand(checkpoint, tmp_path):
    write_plan(tmp_path)
    printed = svl_export("plan=plan.json", f"source={checkpoint('llama')}", "out=new/out", cwd=tmp_path)
    assert printed == f"exported to {tmp_path / 'new' / 'out'}\n"
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").model.layers) == 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_both_ways_to_write_options(checkpoint, tmp_path):
    write_plan(tmp_path)
    source, out = str(checkpoint("llama")), tmp_path / "out"
    for words in (
        ["plan=plan.json", f"source={source}", "out=out", "shard_size=20KB", "trust_remote_code=false"],
        ["--plan", "plan.json", "--source", source, "--out", "out", "--shard-size", "20KB"],
        ["--plan=plan.json", f"--source={source}", "out=out", "--shard_size=20KB", "trust_remote_code=true"],
    ):
        svl_export(*words, cwd=tmp_path)
        assert len(list(out.glob("*.safetensors"))) > 1
        shutil.rmtree(out)


def test_the_installed_command_says_how_it_is_used(tmp_path):
    script = Path(sys.executable).with_name("svl-export")
    done = subprocess.run([script], cwd=tmp_path, capture_output=True, text=True, check=True)
    options = {action.dest for action in export_command.command_parser()._actions} - {"help"}
    assert options == {
        "plan", "source", "out", "patch", "trained", "protect", "shard_size", "push_to_hub", "layers", "revision",
        "name", "trust_remote_code",
    }  # fmt: skip
    for option in options:
        assert f"--{option.replace('_', '-')}" in done.stdout
    assert "name=value" in done.stdout
    assert svl_export("--help", cwd=tmp_path) == done.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plan=plan.json out=out", "required: --source"),
        ("plan=plan.json source=llama out", "required: --out"),
        ("plan=plan.json source=llama out=out more", "unrecognized arguments: more"),
        ("plan=plan.json source=llama output=out", "no setting 'output' (did you mean 'out'?); known: plan, source"),
        ("plan=plan.json source=llama --outt=out", "no setting 'outt' (did you mean 'out'?)"),
        ("plan=no.json source=llama out=out", "plan: cannot read 'no.json'"),
        ("plan=llama/config.json source=llama out=out", "not a plan: key 'n_layers' is missing"),
        ("plan=plan.json source=nowhere out=out", "source: 'nowhere' is neither a folder nor a hub id"),
        ("plan=plan.json source=owner/unknown out=out", "'owner/unknown' is no local folder, and the hub does not"),
        ("plan=plan.json source=llama out=llama", "exists already"),
        ("plan=plan.json source=llama out=out shard_size=big", "shard_size is 'big'"),
        ("plan=plan.json source=llama out=out protect=all", "protect is 'all', but must be one of: auto, none"),
        ("plan=plan.json source=llama out=out trust_remote_code=yes", "trust_remote_code is 'yes', but must be one of"),
        ("plan=plan.json source=llama out=out patch=plan.json", "is not a patch"),
        ("plan=plan.json source=llama out=out patch=no.safetensors", "is not a patch"),
        ("plan=plan.json source=llama out=out push_to_hub=a/b/c", "push_to_hub: "),
        ("plan=plan.json source=llama out=out layers=model.norm", "model.layers='model.norm' is no list"),
    ],
)
def test_mistakes_are_one_line(given, message, checkpoint, tmp_path):
    write_plan(tmp_path)
    (tmp_path / "llama").symlink_to(checkpoint("llama"))
    (line,) = svl_export(*given.split(), cwd=tmp_path, code=1).splitlines()
    assert line.startswith("svl-export: error: ")
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "llama"}


@pytest.fixture
def slow_export(checkpoint, tmp_path, monkeypatch):
    """A process that exports to `out`, halted after the first bytes, and a pipe that tells how it was interrupted."""
    write_plan(tmp_path)
    copied = safetensors_writing.copy_bytes

    def export_slowly(told: Connection) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was started from

        def copy_and_wait(*given):
            copied(*given)
            told.send("copied")
            told.recv()

        monkeypatch.setattr(safetensors_writing, "copy_bytes", copy_and_wait)
        words = ("plan=plan.json", f"source={checkpoint('llama')}", "out=out")
        told.send(run_command(export_command.main, *words, cwd=tmp_path, code=130))

    with another_process(export_slowly) as (process, told):
        assert told.recv() == "copied"
        yield process, told


def test_a_killed_export_leaves_no_checkpoint_and_can_be_run_again(slow_export, checkpoint, tmp_path):
    process, _ = slow_export
    process.kill()
    process.join()
    assert not (tmp_path / "out").exists()
    svl_export("plan=plan.json", f"source={checkpoint('llama')}", "out=out", cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "out"}


def test_an_interrupted_export_leaves_nothing_and_says_so(slow_export, tmp_path):
    process, told = slow_export
    os.kill(process.pid, signal.SIGINT)
    assert told.recv().stderr == "svl-export: interrupted; nothing half-written is left\n"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_second_process_is_told_who_writes_before_any_work(slow_export, tmp_path):
    process, _ = slow_export
    nowhere = "source=nowhere"  # which it does not get to see
    (line,) = svl_export("plan=plan.json", nowhere, "out=out", cwd=tmp_path, code=1).splitlines()
    assert re.search(rf"out' is being written by process {process.pid} on \S+ since \d{{4}}-", line)
    assert not (tmp_path / "out").exists()


def test_hub_ids_are_taken_from_the_local_cache(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    as_hub_cache(checkpoint("llama"), tmp_path / "hub")
    write_plan(tmp_path)
    svl_export("plan=plan.json", "source=owner/name", "out=out", cwd=tmp_path)
    out = tmp_path / "out"
    assert read_card_metadata(out / "README.md")["base_model"] == "owner/name"
    assert json.loads((out / "config.json").read_text())["layer_pruning"]["base_model"] == "owner/name"
    plain = export.save(checkpoint("llama"), Plan(4, (0, 2)), tmp_path / "plain")
    same = digests(plain).keys() - {"README.md", "config.json"}
    assert {n: digests(plain)[n] for n in same} == {n: digests(out)[n] for n in same}
    assert not any(path.is_symlink() for path in out.iterdir())


def test_results_beside_a_plan_are_those_of_its_run(tmp_path):
    (tmp_path / "plan.json").write_text(Plan(4, (1,)).to_json())
    (tmp_path / "result.json").write_text(json.dumps({"plan": {"removed": [1]}, "name": "x"}))
    assert export_command.result_beside_plan(tmp_path / "plan.json", Plan(4, (1,)))["name"] == "x"
    assert export_command.result_beside_plan(tmp_path / "plan.json", Plan(4, (2,))) is None
    assert export_command.result_beside_plan(tmp_path / "other.json", Plan(4, (1,))) is None


@pytest.mark.parametrize(
    ("found", "given", "asked"),
    [
        ({"compensated": ["1.mlp"], "training": None}, {}, ["patch"]),
        ({"compensated": [], "training": {"steps": 5}}, {}, ["trained"]),
        ({"compensated": ["1.mlp"], "training": {"steps": 5}}, {}, ["patch", "trained"]),
        ({"compensated": ["1.mlp"], "training": {"steps": 5}}, {"patch": "p"}, ["trained"]),
    ],
)
def test_what_a_run_changed_is_not_left_behind(found, given, asked, checkpoint, tmp_path):
    """Its scores, which the card tells, are those of the changed weights."""
    (tmp_path / "runs" / "1").mkdir(parents=True)
    write_plan(tmp_path / "runs" / "1")
    keys = {"compensate": ["abc"], "recover": ["def"]}
    result = {"plan": {"removed": [0, 2]}, "settings": {}, "keys": keys, "seed": 0, **found}
    (tmp_path / "runs" / "1" / "result.json").write_text(json.dumps(result))
    words = [f"source={checkpoint('llama')}", "out=out", *(f"{name}={value}" for name, value in given.items())]
    (line,) = svl_export("plan=runs/1/plan.json", *words, cwd=tmp_path, code=1, SVL_STORE="kept").splitlines()
    files = {
        "patch": "patch=kept/patch/abc/patch.safetensors",
        "trained": "trained=kept/recover/def/trained.safetensors",
    }
    assert f"add {' '.join(files[name] for name in asked)} (" in line
    assert not (tmp_path / "out").exists()
    shutil.copy(tmp_path / "runs" / "1" / "plan.json", tmp_path)
    if not given:
        svl_export("plan=plan.json", *words, cwd=tmp_path)


def test_what_a_run_changed_is_taken_from_its_store(llama, checkpoint, tmp_path):
    """Which lies beside a folder above the plan; the same as with the file named."""
    plan, folder = Plan(4, (0, 2)), tmp_path / "out" / "run" / "time"
    (stored := tmp_path / "out" / "store" / "patch" / "abc").mkdir(parents=True)
    patch_file.save_patch(some_patch(llama, plan), stored / "patch.safetensors")
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.to_json())
    result = {"plan": {"removed": [0, 2]}, "settings": {}, "seed": 0, "scores": {}, "keys": {"compensate": ["abc"]}}
    (folder / "result.json").write_text(json.dumps({**result, "compensated": ["1.mlp"]}))
    words = ("plan=out/run/time/plan.json", f"source={checkpoint('llama')}")
    svl_export(*words, "out=found", cwd=tmp_path)
    svl_export(*words, f"patch={stored / 'patch.safetensors'}", "out=named", cwd=tmp_path)
    shutil.copy(folder / "plan.json", tmp_path)
    svl_export("plan=plan.json", words[1], "out=bare", cwd=tmp_path)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("found", "named", "bare")]
    assert weights[0] == weights[1] != weights[2]


def test_the_card_tells_scores_of_these_weights_only(llama, checkpoint, tmp_path):
    """A run's are those of the patch and the training that are stored under its keys."""
    plan = Plan(4, (0, 2))
    (tmp_path / "plan.json").write_text(plan.to_json())
    for key in ("abc", "other"):
        (tmp_path / "patch" / key).mkdir(parents=True)
        patch_file.save_patch(some_patch(llama, plan), tmp_path / "patch" / key / "patch.safetensors")
    metrics = {"accuracy": {"value": 0.5, "stderr": None, "dense": 0.75}}
    scores = {"task": {"metric": "accuracy", "n": 8, "metrics": metrics}}
    result = {"plan": {"removed": [0, 2]}, "settings": {}, "seed": 0, "keys": {"compensate": ["abc"]}}
    (tmp_path / "result.json").write_text(json.dumps({**result, "compensated": ["1.mlp"], "scores": scores}))
    for key in ("abc", "other"):
        words = (f"source={checkpoint('llama')}", f"patch=patch/{key}/patch.safetensors", f"out={key}")
        svl_export("plan=plan.json", *words, cwd=tmp_path)
        assert ("## Results" in (tmp_path / key / "README.md").read_text()) == (key == "abc")


def test_results_are_of_a_plan_with_the_same_parts(tmp_path):
    """Equal layers are not all that goes."""
    (tmp_path / "result.json").write_text(json.dumps({"plan": {"removed": [1], "removed_mlp": [2]}, "name": "x"}))
    same, other = Plan(4, (1,), removed_mlp=(2,)), Plan(4, (1,), removed_mlp=(3,))
    assert export_command.result_beside_plan(tmp_path / "plan.json", same)["name"] == "x"
    assert export_command.result_beside_plan(tmp_path / "plan.json", other) is None


@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json"])
def test_the_exported_processor_has_the_settings_of_the_run(mimic, tmp_path, place):
    """As the run's result beside the plan says; from either file that transformers keeps an image processor in."""
    source = shutil.copytree(mimic("llava_15_13b"), tmp_path / "source")
    if place == "processor_config.json":
        AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "saved")
        (source / "preprocessor_config.json").unlink()
        shutil.copy(tmp_path / "saved" / place, source / place)
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [0.25, 0.5, 0.75]}
    plan = {"n_layers": 8, "removed": [3]}
    result = {"plan": plan, "settings": {"model": {"image_processor": settings}}, "scores": {}, "seed": 0}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "result.json").write_text(json.dumps(result))
    svl_export("plan=plan.json", "source=source", "out=out", cwd=tmp_path)
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert type(images).__name__ == "LlavaImageProcessor"
    assert (images.do_pad, list(images.image_mean)) == (True, [0.25, 0.5, 0.75])
    assert images.size == AutoProcessor.from_pretrained(source).image_processor.size
