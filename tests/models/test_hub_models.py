"""Every file of conf/model that names a hub id, from its checkpoint to one that is pruned, on files like the real ones.

The checkpoints are tiny and random (tests/helpers/hub_mimics); names, keys, types and layouts are those of the hub's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ENVIRONMENT, run_svl
from helpers.hub_mimics import MIMICS
from helpers.references import close, compensated, eager_maps, logits
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import svl
from svl import config
from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate
from svl.checkpoints.conversion import convert
from svl.checkpoints.export import save
from svl.config_methods import build_method
from svl.core import Plan, Stats, SvlError
from svl.data.sample_files import read_samples
from svl.data.samples import Samples
from svl.models.lvlm import Lvlm
from svl.models.prompts import with_prompt_style
from svl.models.sample_inputs import encode_samples
from svl.pruning import folding
from svl.pruning.surgery import apply

PICKLED = ("mplug_owl2", "qwen_vl_chat")
POST_NORM = ("gemma3_4b", "paligemma2_3b")  # Gemma normalises what it writes, so that no projection can be corrected
DETERMINED = {"linear_replaceme": {"ridge": 1e-3}}  # without a ridge, few tokens give maps that magnify rounding
PROTECTED = {"qwen3_vl_8b": {0, 1, 2}}
MODEL_FILES = sorted((config.CONF / "model").glob("*.yaml"))
COMPENSATIONS = sorted(file.stem for file in (config.CONF / "compensation").glob("*.yaml"))


def model_settings(name: str) -> DictConfig:
    """What conf/model/<name>.yaml says, with the defaults."""
    config.register_with_hydra()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", overrides=[f"model={name}"]).model


@dataclass(frozen=True)
class Prepared:
    """A model as its file in conf/model has it, in float32, and what was measured on mixed samples in one batch."""

    name: str
    folder: Path
    lvlm: Lvlm
    samples: Samples
    stats: Stats
    plan: Plan


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Three samples of unequal lengths with pictures of unequal forms, the second without one."""
    folder = tmp_path_factory.mktemp("mixed")
    asked = {
        "What colour is the shape?": (40, 30),
        "Name three colours that are neither red nor blue, please.": None,
        "Where is the circle?": (30, 60),
    }
    rows = []
    for number, (prompt, size) in enumerate(asked.items()):
        rows.append({"prompt": prompt, "answer": "red"})
        if size:
            pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            rows[-1]["image"] = f"{number}.png"
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "mixed.jsonl"


@pytest.fixture(scope="module", params=sorted(MIMICS))
def prepared(request, mimic, mixed, tmp_path_factory) -> Prepared:
    name, folder = request.param, mimic(request.param)
    if name in PICKLED:
        folder = convert(folder, tmp_path_factory.mktemp("converted") / name)
    settings = model_settings(name)
    loaded = svl.load(folder, device="cpu", dtype="float32", name=name)
    lvlm = with_prompt_style(loaded, settings.prompt, config.plain_values(settings.image_processor))
    samples = read_samples(mixed)
    n = lvlm.anatomy.n_layers
    return Prepared(name, folder, lvlm, samples, calibrate(lvlm, samples, batch_size=3), Plan(n, (n - 4, n - 2)))


def test_every_model_file_that_names_a_hub_id_is_here():
    paths = {file.stem: str(OmegaConf.to_container(OmegaConf.load(file))["path"]) for file in MODEL_FILES}
    assert set(MIMICS) == {name for name, path in paths.items() if re.fullmatch(r"[\w.-]+/[\w.-]+", path)}


def test_layers_are_found_and_protected(prepared):
    assert set(prepared.lvlm.anatomy.protected) == PROTECTED.get(prepared.name, set())
    assert prepared.lvlm.anatomy.n_layers == (32 if prepared.name in ("llava_15_7b", "llava_next_7b") else 8)


def test_statistics_of_a_mixed_batch_are_those_of_eager_attention_alone(prepared):
    lvlm = prepared.lvlm
    for sample, trace in zip(prepared.samples, prepared.stats.traces, strict=True):
        has_image = bool(sample.images)
        inputs = lvlm.encode([lvlm.prompt(sample.prompt, has_image)], [sample.pictures])
        maps: dict[int, Tensor] = {}
        with eager_maps(lvlm, maps) as model:
            logits(model, inputs)
        assert bool(trace.visual.any()) == has_image
        modality = torch.stack([trace.visual, ~trace.visual]).float()
        assert trace.received is not None
        assert trace.emitted is not None
        for layer, heads in maps.items():
            attention = heads.mean(0)
            torch.testing.assert_close(trace.received[layer], modality @ attention, atol=5e-4, rtol=0)
            torch.testing.assert_close(trace.emitted[layer], (attention @ modality.T).T, atol=5e-4, rtol=0)
        assert len(maps) == lvlm.anatomy.n_layers


FUSED = ("mplug_owl2", "qwen_vl_chat")  # projections of several heads, or of several modalities, in one tensor
EACH = 5


def compensations_of(name: str) -> list[str]:
    """Some of the compensations, other ones for the next model of the same kind; joins, where these are refused."""
    kind = next((names for names in (POST_NORM, FUSED) if name in names), sorted({*MIMICS} - {*POST_NORM, *FUSED}))
    first = EACH * kind.index(name)
    chosen = [COMPENSATIONS[(first + k) % len(COMPENSATIONS)] for k in range(EACH)]
    return list(dict.fromkeys(["come", *chosen]))[:EACH] if name in FUSED else chosen


def test_every_compensation_meets_several_models():
    met = Counter(choice for name in MIMICS for choice in compensations_of(name) if name not in POST_NORM)
    assert met.keys() == {*COMPENSATIONS}
    assert min(met.values()) >= 2


@pytest.mark.parametrize("pick", range(EACH))
def test_compensations_are_folded_in(prepared, pick):
    choice = compensations_of(prepared.name)[pick]
    lvlm, plan = prepared.lvlm, prepared.plan
    node = OmegaConf.load(config.CONF / "compensation" / f"{choice}.yaml")
    node.update(DETERMINED.get(choice, {}))
    method = build_method(OmegaConf.create({"seed": 0, "strategy": {}, "it": node}).it, "compensation")
    if method.needs and prepared.name in POST_NORM:
        with pytest.raises(SvlError, match="normalises after its projections"):
            folding.check_foldable(lvlm)
        return
    hidden = Activations(lvlm, prepared.samples, prepared.stats, 3) if method.needs else None
    if choice == "come" and prepared.name in FUSED:
        with pytest.raises(SvlError, match="not known how layers are joined"):
            apply(lvlm, plan, method.fit(hidden, plan))
        return
    patch = method.fit(hidden, plan)
    inputs, _, _ = encode_samples(lvlm, prepared.samples.samples)
    with compensated(lvlm, plan, patch) as reference:
        close(logits(apply(lvlm, plan, patch).model, inputs), logits(reference, inputs), 1e-3)


def test_a_whole_run_ends_in_a_checkpoint(prepared, mixed, tmp_path):
    """Calibration, plan, check, compensation, benchmark and export; then the export alone."""
    compensation = "none" if prepared.name in POST_NORM else "linear"
    run_svl(
        f"model={prepared.name}", f"model.path={prepared.folder}", "model.dtype=float32", "tracker=none",
        "calibration=local", f"calibration.path={mixed}", "calibration.batch_size=3", f"compensation={compensation}",
        "n_remove=2", "benchmark=smoke", "benchmark.limit=1", "benchmark.max_new_tokens=2", "paths.store=store",
        "paths.outputs=out", "hydra.run.dir=run", "export.path=pruned", cwd=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["scores"]) == 3
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    exported = svl.load(tmp_path / "pruned", device="cpu", dtype="float32", name="exported")
    assert exported.model.config.get_text_config().num_hidden_layers == len(plan.kept)
    exported = with_prompt_style(exported, model_settings(prepared.name).prompt)  # its pictures: as the files say
    asked = [s for s in prepared.samples if s.images]

    def encoded(lvlm: Lvlm) -> dict[str, Tensor]:
        return lvlm.encode([lvlm.prompt(s.prompt, True) for s in asked], [s.pictures for s in asked])

    ours, theirs = encoded(prepared.lvlm), encoded(exported)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.isfinite(logits(exported.model, theirs)).all()
    if compensation == "none":
        close(logits(exported.model, theirs), logits(apply(prepared.lvlm, plan).model, ours), 1e-5)


def test_exports_compute_the_same_where_svl_cannot_be_imported(mimic, tmp_path):
    """In one process for all; checkpoints of the ports need svl."""
    expected = {}
    for name in sorted(set(MIMICS) - set(PICKLED)):
        settings = OmegaConf.to_container(OmegaConf.load(config.CONF / "model" / f"{name}.yaml"))
        lvlm = with_prompt_style(svl.load(mimic(name), device="cpu", dtype="float32"), settings.get("prompt", "chat"))
        plan = Plan(lvlm.anatomy.n_layers, lvlm.anatomy.removable[-2:])
        save(mimic(name), plan, tmp_path / name / "pruned")
        inputs = lvlm.encode([lvlm.prompt("What colour is it?", 1)], [[Image.new("RGB", (40, 30), "red")]])
        save_file({key: tensor.contiguous() for key, tensor in inputs.items()}, tmp_path / name / "inputs.safetensors")
        expected[name] = logits(apply(lvlm, plan).model, inputs)
    script = Path(__file__).parents[1] / "helpers" / "plain_reload.py"
    command = [sys.executable, "-I", str(script), *(str(tmp_path / name) for name in expected)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    for name, ours in expected.items():
        close(load_file(tmp_path / name / "logits.safetensors")["logits"], ours, 1e-5)
