"""`svl doctor`: what it says of folders, and that a run agrees with it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from helpers.commands import run_svl
from helpers.families import LLAMA, build, config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import svl
from svl.doctor.memory import Load, ModelShape, stage_needs
from svl.doctor.model_checks import model_shape

QUIET = ("benchmark=none", "tracker=none", "paths.store=store")


@pytest.fixture
def doctor(tmp_path):
    """The page for these settings; `code` is the exit status that is expected."""

    def asked(*words, code=0):
        return run_svl("doctor", *QUIET, *words, cwd=tmp_path, code=code).stdout

    return asked


def section(page: str, title: str) -> str:
    """One part of a page."""
    return next(part for part in page.split("\n\n") if part.startswith(title))


def test_a_folder_that_will_do(doctor, checkpoint):
    page = doctor("model=local", f"model.path={checkpoint('llava')}", "ratio=0.5")
    assert "nothing found that would end a run" in page
    model = section(page, "model")
    assert "4 decoder layers ('model.language_model.layers'), of width 32" in model
    assert "ratio=0.5 removes 2 layers, of 4 that may go" in model
    assert "attention and MLP of every layer write through one matrix" in model
    assert "64 samples" in section(page, "calibration")
    assert "FAILS" not in page


def test_no_weight_is_read(doctor, checkpoint, tmp_path):
    """Only headers: the page is the same for weights that are not numbers."""
    folder = shutil.copytree(checkpoint("llava"), tmp_path / "copy")
    before = doctor("model=local", f"model.path={folder}")
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin:] = b"\xff" * (len(content) - begin)
    file.write_bytes(content)
    assert doctor("model=local", f"model.path={folder}") == before


@pytest.mark.parametrize("kind", ["llava", "qwen", "llama"])
def test_the_shape_without_weights_is_that_of_the_weights(kind, checkpoint):
    folder = checkpoint(kind)
    lvlm = svl.load(folder, device="cpu")
    shape = model_shape(lvlm, torch.float32)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    assert shape.parameters == sum(tensor.numel() for tensor in stored.values())
    config = lvlm.model.config.get_text_config()
    assert (shape.layers, shape.hidden) == (config.num_hidden_layers, config.hidden_size)
    assert shape.mlp_width == config.intermediate_size
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert shape.cache_width == 2 * config.num_key_value_heads * head


def test_a_dtype_that_only_the_weights_tell_is_that_of_loading(doctor, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "half")
    save_file(
        {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors"
    )
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({n: v for n, v in fields.items() if not n.endswith("dtype")}))
    assert svl.load(folder, device="cpu").model.dtype == torch.bfloat16
    assert "in bfloat16" in section(doctor("model=local", f"model.path={folder}"), "model")


def test_a_card_that_cannot_be_read_ends_no_run(doctor, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "carded")
    (folder / "README.md").write_text(f"---\nlicense: mit\na: {'[' * 10**5}\n---\n")
    assert "note  its model card cannot be read: lists are nested" in doctor("model=local", f"model.path={folder}")


def test_experts_are_no_single_matrices(doctor, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "experts")
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    build(config("mixtral", **LLAMA, **experts), auto=AutoModelForCausalLM).model.save_pretrained(folder)
    page = section(doctor("model=local", f"model.path={folder}"), "model")
    assert "has several matrices (experts): compensations that refit it are refused there" in page
    assert "through one matrix" not in page


def test_memory_by_hand():
    """LLaVA-1.5-7B in half precision, 64 samples of 640 tokens."""
    shape = ModelShape(7_063_427_072, 2, 32, 4096, 11008, 2 * 4096, 32064)
    needs = {need.stage: need.bytes for need in stage_needs(shape, Load(64, 640, 8, 16, 32, windows=True), 8)}
    assert needs["load"] == 14_126_854_144
    activations = 8 * 640 * (3 * 11008 + 4 * 4096) * 2
    two_states = 2 * 8 * 640 * 4096 * 4
    all_states, cosines = 33 * 8 * 640 * 4096 * 2, 528 * 8 * 640 * 4
    compared = 2 * 1024 * 33 * 4096 * 4
    assert needs["calibrate"] == needs["load"] + all_states + cosines + max(activations + two_states, compared)
    systems = (2 * 11008 * (11008 + 4096) + 2 * 11008 * 11008) * 8
    assert needs["compensate, by least squares"] == needs["load"] + 2 * 64 * 640 * 4096 * 2 + systems
    assert needs["keep the patch of a refit"] == 24 * 4096 * (11008 + 4096) * 2
    cache = 16 * (640 + 32) * 32 * 8192 * 2
    prompt = 16 * 640 * (3 * 11008 + 4 * 4096) * 2
    assert needs["evaluate"] == needs["load"] + cache + 16 * 32064 * 4 + prompt
    assert needs["export"] == needs["load"] * 3 // 4


@pytest.mark.parametrize(
    ("words", "title", "line"),
    [
        (["model=local", "model.path=nowhere"], "model", "'nowhere' is neither a folder nor a hub id"),
        (["model=local", "model.path=owner/name"], "model", "the hub does not answer for it"),
        (["n_remove=99"], "model", "n_remove=99, but only 16 may go"),
        (["strategy=shortgpt", "+strategy.alpha=3"], "settings", "strategy has no setting 'alpha'"),
        (["calibration=local", "calibration.path=none.jsonl"], "calibration", "there is no file 'none.jsonl'"),
        (
            ["calibration=local", "calibration.path=bad.jsonl"],
            "calibration",
            "cannot read the picture 'x.png' of row 0",
        ),
        (["calibration.images=nowhere"], "calibration", "calibration.images: there is no folder 'nowhere'"),
        (["benchmark=pope", "benchmark.data=."], "benchmark", "has no folder 'POPE'"),
    ],
)
def test_what_ends_a_run_is_named_and_the_rest_goes_on(words, title, line, doctor, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"image": "x.png", "prompt": "What?"}))
    page = doctor(*words, code=1)
    failing = [text for text in section(page, title).splitlines() if text.startswith("  FAILS")]
    assert len(failing) == 1
    assert line in failing[0]
    assert "1 of these will end a run" in page
    for other in ("libraries", "settings", "model", "calibration", "benchmark"):
        assert section(page, other)


def test_a_wrong_ratio_is_on_the_page_with_all_else(doctor):
    page = doctor("ratio=1.5", "n_remove=null", "recovery=projector", code=1)
    assert "FAILS ratio is 1.5, but must lie in [0, 1)" in section(page, "settings")
    assert "  ok" in section(page, "calibration")


def test_what_it_calls_impossible_fails_and_what_it_does_not_runs(doctor, checkpoint, tmp_path):
    """A run of the same settings agrees."""
    model = ("model=local", f"model.path={checkpoint('llama')}", "calibration.samples=4", "paths.outputs=out")
    for words, code in [(("n_remove=2",), 0), (("n_remove=5",), 1)]:
        doctor(*model, *words, code=code)
        run_svl(*QUIET, *model, "strategy=shortgpt", *words, cwd=tmp_path, code=code)


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (("strategy=sleb",), ["trying removals out"]),
        (("strategy=shortened_taylor", "strategy.protected=[0]"), ["gradients"]),
        (("strategy=tail",), []),
    ],
)
def test_plans_take_what_their_strategy_does(words, listed, doctor, checkpoint):
    memory = section(doctor("model=local", f"model.path={checkpoint('llava')}", *words), "memory")
    assert re.findall(r"plan, by ([a-z ]+):", memory) == listed


def test_recovery_is_among_the_stages_only_where_something_is_trained(doctor, checkpoint):
    model = ("model=local", f"model.path={checkpoint('llava')}")
    assert "recover:" not in section(doctor(*model), "memory")
    assert "recover:" in section(doctor(*model, "recovery=projector"), "memory")


@pytest.mark.parametrize(
    ("model", "words", "line"),
    [
        ("llava", ["recovery.data.path=none.jsonl"], "there is no file 'none.jsonl'"),
        ("llava", ["recovery.data.path=asked.jsonl"], "recovery needs answers, but 1 samples have none"),
        ("llava", ["recovery.data.path=told.jsonl", "recovery.data.images=none"], "recovery.data.images: there is no"),
        ("llava", ["recovery.data.path=told.jsonl", "n_remove=4"], "plan removes all 4 decoder layers"),
        ("llama", ["recovery.data.path=told.jsonl"], "projector"),
        ("llava", ["recovery.data.path=told.jsonl"], "no sample of recovery.data has a picture"),
        ("llava", ["recovery=lora", "recovery.data.path=long.jsonl"], "row 1 of 'long.jsonl' has 3"),
        ("llava", ["recovery=lora", "recovery.data.path=marked.jsonl"], "row 1 of 'marked.jsonl': the prompt"),
    ],
)
def test_what_ends_a_recovery_is_named_and_memory_told_all_the_same(model, words, line, doctor, checkpoint, tmp_path):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "What?"}))
    (tmp_path / "told.jsonl").write_text(json.dumps({"prompt": "What?", "answer": "red"}))
    good = json.dumps({"prompt": "What?", "answer": "red"})
    (tmp_path / "long.jsonl").write_text(f"{good}\n{json.dumps({'prompt': 'the ' * 3000, 'answer': 'red'})}")
    (tmp_path / "marked.jsonl").write_text(f"{good}\n{json.dumps({'text': 'An <image> in a text.', 'prompt': None})}")
    columns = "recovery.data.columns={image: null}"
    page = doctor("model=local", f"model.path={checkpoint(model)}", "recovery=projector", f"+{columns}", *words, code=1)
    failing = [text for text in section(page, "recovery").splitlines() if text.startswith("  FAILS")]
    assert any(line in text for text in failing), page
    assert "calibrate:" in section(page, "memory")


def test_what_recovery_trains_and_on_what_is_told(doctor, checkpoint, tmp_path):
    """Longer samples than those of calibration take more."""
    model = ("model=local", f"model.path={checkpoint('llava')}", "recovery=projector", "calibration.samples=4")
    told = section(doctor(*model), "recovery")
    assert "it trains on the calibration set" in told
    projector = svl.load(checkpoint("llava"), device="cpu").model.get_submodule("model.multi_modal_projector")
    numbers = sum(p.numel() for p in projector.parameters())
    assert f"trains {numbers / 1e6:.3g} of " in told
    model = (*model[:2], "recovery=lora", model[3])
    rows = [{"prompt": "what " * 300, "answer": "red"}, {"prompt": "what " * 100, "answer": "red " * 300}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("recovery.data.path=long.jsonl", "+recovery.data.columns={image: null}")
    told = section(doctor(*model, *data), "recovery")
    assert "2 samples from 'long.jsonl'" in told
    tokens, answer = map(
        int, re.search(r"(\d+) tokens in the longest sample, (\d+) in the longest answer", told).groups()
    )
    assert 400 < tokens < 420
    assert 300 <= answer < 305
    needs = [
        float(re.search(r"recover: ([\d.]+) MB", section(page, "memory"))[1])
        for page in (doctor(*model), doctor(*model, *data))
    ]
    assert needs[1] > 1.5 * needs[0]


def test_protected_layers_are_listed_with_the_reason(doctor, mimic):
    page = doctor("model=local", f"model.path={mimic('qwen3_vl_8b')}")
    assert re.search(r"note  stay: 0-\d: visual features enter after it, by its position \(DeepStack\)", page)


def test_pickles_are_said_to_need_conversion(doctor, mimic):
    page = doctor("model=local", f"model.path={mimic('qwen_vl_chat')}")
    assert "its weights are pickles: for export and vLLM, convert them once (svl-export convert)" in page


def test_a_norm_behind_projections_fails_only_with_a_compensation(doctor, mimic):
    path = f"model.path={mimic('gemma3_4b')}"
    assert "note  'gemma3_4b' normalises after its projections" in doctor("model=local", path, "compensation=none")
    assert "FAILS 'gemma3_4b' normalises" in doctor("model=local", path, "compensation=refit", code=1)


def test_a_wrong_setting_is_one_line(tmp_path):
    done = run_svl("doctor", "modell=x", cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "svl doctor model=" in run_svl("doctor", "--help", cwd=tmp_path).stdout
