"""Stages of a run: what is shared, and what is refused before it costs anything."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.hub_mimics import MIMICS
from helpers.pairwise import pairwise
from hydra import compose, initialize_config_dir

from svl import config
from svl.calibration import calibrate, rescoring
from svl.checkpoints import export, fingerprint
from svl.config import CONF
from svl.core import Plan, SvlError
from svl.pruning import folding
from svl.run import pipeline
from svl.run.setup import RunSetup


def test_one_pass_serves_strategies_selectors_and_ratios(tmp_path, monkeypatch):
    """A whole sweep calibrates once: in two batches, whose forward passes are counted."""
    passes = []

    def counted(*args):
        passes.append(len(args[1]))
        return measure_batch(*args)

    measure_batch = calibrate.measure_batch
    monkeypatch.setattr(calibrate, "measure_batch", counted)
    config.register_with_hydra()
    plans = set()
    strategies = ("shortgpt", "angular", "streamline", "interlace", "spaced")
    grid = pairwise({"strategy": strategies, "selector": ("tis", "all"), "ratio": (0.125, 0.25)})
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for chosen in grid:
            words = [*(f"{name}={value}" for name, value in chosen.items()), "compensation=none"]
            words += ["benchmark=none", "tracker=none", "calibration.samples=6", "calibration.batch_size=4"]
            words += [f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", "model.device=cpu"]
            words += ["calibration.statistics=[cosine,windows,attention]"]  # all that any of them asks for
            run = pipeline.Run(compose("config", overrides=words), tmp_path)
            plans.add(tuple(run.plan(run.calibrate()).output["removed"]))
    assert passes == [4, 2]
    assert len(list((tmp_path / "stats").iterdir())) == 1
    assert len(plans) > 4


def test_a_compensation_that_is_refused_costs_no_calibration(tmp_path, monkeypatch):
    def refuse(lvlm):
        raise SvlError("normalises after its projections")

    monkeypatch.setattr(folding, "check_foldable", refuse)
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))
    config.register_with_hydra()
    words = ["strategy=shortgpt", "compensation=subspace", "benchmark=none", "tracker=none", "model.device=cpu"]
    words += [f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", "calibration.samples=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = pipeline.Run(compose("config", overrides=words), tmp_path)
    with pytest.raises(SvlError, match="normalises after"):
        run.calibrate()


def mimic(name: str, folder: Path) -> list[str]:
    """Words that choose a tiny stand-in of a checkpoint on the hub."""
    MIMICS[name](folder / name)
    words = ["model=local", f"model.path={folder / name}", "calibration=demo", "calibration.samples=2"]
    return [*words, "tracker=none", "model.device=cpu", f"paths.store={folder}/store", f"paths.outputs={folder}"]


def test_layers_that_cannot_be_joined_cost_no_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))
    words = [*mimic("qwen_vl_chat", tmp_path), "strategy=come", "n_remove=1", "benchmark=none"]
    config.register_with_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = pipeline.Run(compose("config", overrides=words), tmp_path)
    with pytest.raises(SvlError, match=r"cannot be joined: 'attn\.c_attn\.weight' is a tensor of which"):
        run.execute()


def test_a_patch_that_does_not_fit_is_found_before_anything_is_scored(tmp_path, monkeypatch):
    """Visual features of DeepStack enter behind the gap, at a size that `magnitude` cannot change."""
    monkeypatch.setattr(pipeline.ModelVariant, "evaluate", lambda *_: pytest.fail("evaluated nevertheless"))
    words = [*mimic("qwen3_vl_8b", tmp_path), "model.protect=none", "strategy=manual", "strategy.layers=[0]"]
    config.register_with_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*words, "compensation=magnitude", "benchmark=smoke", "benchmark.limit=1"])
    with pytest.raises(SvlError, match=r"scales what layers write, but without layers \[0\]"):
        pipeline.Run(cfg, tmp_path).execute()


def test_the_whole_checkpoint_is_read_again_if_a_run_says_so(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(fingerprint, "LARGE", 1000)
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: (read.append(path.name), "0" * 64)[1])
    config.register_with_hydra()

    def weights_read(*words: str) -> tuple[int, str]:
        read.clear()
        always = ["benchmark=none", "tracker=none", f"paths.store={tmp_path}", f"paths.outputs={tmp_path}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            setup = RunSetup(compose("config", overrides=[*always, *words]))
        return sum(name.endswith(".safetensors") for name in read), setup.model["fingerprint"]

    first = weights_read()
    assert first[0] > 0
    assert weights_read() == (0, first[1])
    assert weights_read("model.full_hash=true") == first


# ------------------------------------------------------------------------------------------------- out of memory

STAGES = {  # what runs out of memory -> its stage in the store, and what the one line says
    "svl.models.loading.load": (
        "check",
        "loading the model ran out of memory.*model.dtype.*model.offload",
    ),
    "svl.calibration.calibrate.measure_batch": ("stats", "ran out of memory.*calibration.batch_size"),
    "svl.strategies.cosine.Cosine.plan": ("plan", "stage 'plan' ran out of memory.*fewer or shorter samples"),
    "svl.pruning.selfcheck.check_surgery": ("check", "stage 'check' ran out of memory.*model.device=cpu"),
    "svl.compensation.linear.Linear.fit": ("patch", "stage 'patch' ran out of memory.*another compensation"),
    "svl.evaluation.perplexity.evaluate_perplexity": ("score", "stage 'score' ran out of memory.*benchmark.batch_size"),
    "svl.evaluation.efficiency.measure_efficiency": ("efficiency", "stage 'efficiency' ran out of memory.*batch_size"),
    "svl.checkpoints.export.save": ("run", "the export ran out of memory"),
}


def whole_run(folder: Path, *words: str):
    """A run of every stage, with its store in `folder`."""
    words += ("strategy=shortgpt", "compensation=linear", "calibration.samples=2", "model.device=cpu", "tracker=none")
    words += ("benchmark=prose", "benchmark.limit=1", "efficiency.repeats=1", "efficiency.new_tokens=2")
    config.register_with_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*words, f"paths.store={folder}/store", f"paths.outputs={folder}"])
    return pipeline.run_configuration(cfg, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The store of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    whole_run(folder)
    return folder / "store"


@pytest.mark.parametrize("place", STAGES)
def test_running_out_of_memory_is_one_line_in_every_stage(place, finished, tmp_path, monkeypatch):
    def exhaust(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    stage, line = STAGES[place]
    shutil.copytree(finished, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / stage)
    monkeypatch.setattr(place, exhaust)
    with pytest.raises(SvlError, match=line) as caught:
        whole_run(tmp_path, *([f"export.path={tmp_path / 'pruned'}"] if stage == "run" else []))
    assert "\n" not in str(caught.value)
    assert "asked for 2.00 GiB" in str(caught.value)


# ------------------------------------------------------------------------------------- seeds, ratios, names, exports


DEMO_TASKS = ("svl_demo_existence", "svl_demo_choice", "svl_demo_open")


def composed(folder: Path, *words: str):
    """A configuration without benchmark, with its store in `folder`."""
    where = ["benchmark=none", "tracker=none", f"paths.store={folder}/store", f"paths.outputs={folder}"]
    config.register_with_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*where, *words])


@pytest.mark.parametrize(
    ("words", "depends"),
    [
        (["strategy=tail"], False),
        (["strategy=random"], True),
        (["strategy=shortgpt", "selector=random"], True),
        (["strategy=shortgpt", "selector=tis", "seed=5"], False),
        (["strategy=tail", "calibration.seed=${seed}"], True),
    ],
)
def test_whether_another_seed_would_change_anything(words, depends, tmp_path):
    assert RunSetup(composed(tmp_path, *words)).depends_on_seed() == depends


@pytest.mark.parametrize(
    ("words", "evaluation"),
    [
        ([], None),
        (["benchmark.max_new_tokens=4"], None),  # the tasks' own
        (["benchmark.batch_size=3", "benchmark.likelihood=true"], None),  # changes no answer
        (["benchmark.tasks.svl_demo_open.max_new_tokens=2"], {"max_new_tokens": {"svl_demo_open": 2}}),
        (["benchmark.max_new_tokens=2", "benchmark=smoke"], {"max_new_tokens": dict.fromkeys(DEMO_TASKS, 2)}),
        (["benchmark.frames=3"], {"frames": 3}),
    ],
)
def test_what_changes_answers_tells_runs_apart(words, evaluation, tmp_path):
    setup = RunSetup(composed(tmp_path, "benchmark=demo", *words))
    assert setup.distinguishing_settings().get("evaluation") == evaluation
    setup.cfg.evaluator.name = "vllm"
    found = setup.distinguishing_settings()["evaluation"]
    assert found == {**(evaluation or {}), "evaluator": {"name": "vllm", "options": {}}}


def test_ratios_that_print_alike_are_one(tmp_path):
    """As of range(0.1,0.41,0.1), whose third value is 0.30000000000000004."""
    plans = {pipeline.Run(composed(tmp_path, "strategy=tail", f"ratio={r}"), tmp_path).plan(None).key
             for r in ("0.3", "0.30000000000000004")}  # fmt: skip
    assert len(plans) == 1


def test_sublayers_are_recorded_under_the_ratio_that_was_asked_for(tmp_path):
    """Two of one layer, and two of two layers, are one layer of the share; nothing depends on which they are."""
    found = {}
    for name, asked in (
        *(("sublayer_cosine", f"ratio={ratio}") for ratio in (0.25, 0.5, 0.75)),
        ("sublayer_cosine", "n_remove=8"),
        ("llm_drop_attn", "ratio=0.1"),
        ("shortgpt", "ratio=0.1"),
        ("shortgpt", "n_remove=4"),
        ("manual", "strategy.attn=[1,2]"),
        ("manual", "strategy.layers=[2,9]"),
    ):
        words = [f"strategy={name}", asked, "calibration.samples=2", "model.device=cpu"]
        run = pipeline.Run(composed(tmp_path, *words, "calibration.statistics=[cosine,sublayers]"), tmp_path)
        plan = json.loads((run.plan(run.calibrate()).path / "plan.json").read_text())
        found[name, asked] = plan["ratio"], plan["removed_share"] * 16
        if asked == "ratio=0.75":
            assert plan["removed"]  # some lose both
    assert found == {
        ("sublayer_cosine", "ratio=0.25"): (0.25, 2),
        ("sublayer_cosine", "ratio=0.5"): (0.5, 4),
        ("sublayer_cosine", "ratio=0.75"): (0.75, 6),
        ("sublayer_cosine", "n_remove=8"): (0.5, 4),
        ("llm_drop_attn", "ratio=0.1"): (0.1, 1),
        ("shortgpt", "ratio=0.1"): (0.1, 2),
        ("shortgpt", "n_remove=4"): (0.25, 4),
        ("manual", "strategy.attn=[1,2]"): (1 / 16, 1),
        ("manual", "strategy.layers=[2,9]"): (0.125, 2),
    }


def test_a_removed_attention_that_is_still_computed_is_told_of(tmp_path, caplog):
    run = pipeline.Run(composed(tmp_path, "strategy=manual", "strategy.attn=[0,3]", "model.device=cpu"), tmp_path)
    caplog.set_level("INFO")
    for _ in range(2):  # measured, then stored
        caplog.clear()
        run.check(Plan(16, (), removed_attn=(0, 3)))
        assert [line for line in caplog.messages if line.startswith("  0.attn: zeros are written in memory")]


def test_what_an_export_would_be_refused_for_is_found_before_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))

    def refuse(source, path, options, *, n_remove, compensates):
        assert (n_remove, compensates) == (3, True)
        raise SvlError("pickled weights")

    monkeypatch.setattr(export, "check_exportable", refuse)
    words = ["strategy=shortgpt", "compensation=linear", "n_remove=3", f"export.path={tmp_path / 'pruned'}"]
    with pytest.raises(SvlError, match="pickled weights"):
        pipeline.run_configuration(composed(tmp_path, *words), tmp_path)


def test_an_export_folder_is_held_during_the_whole_run(tmp_path, monkeypatch):
    seen = []

    def second_process(*_, **__):
        with ThreadPoolExecutor() as pool, pytest.raises(SvlError, match="pruned' is being written by process"):
            pool.submit(lambda: export.reserve_export(tmp_path / "pruned").__enter__()).result()
        seen.append(True)
        raise SvlError("enough")

    monkeypatch.setattr(calibrate, "calibrate", second_process)
    with pytest.raises(SvlError, match="enough"):
        pipeline.run_configuration(
            composed(tmp_path, "strategy=shortgpt", "calibration.samples=2", f"export.path={tmp_path / 'pruned'}"),
            tmp_path,
        )
    assert seen == [True]


def test_a_stepwise_search_is_continued_and_told_of(tmp_path, monkeypatch):
    """Three layers after two measure once more; another compensation measures all again, and is another plan."""
    measured = []
    again = calibrate.calibrate
    monkeypatch.setattr(rescoring, "calibrate", lambda lvlm, *args, **options: (
        measured.append(lvlm.anatomy.n_layers), again(lvlm, *args, **options))[1])  # fmt: skip
    words = ["strategy=prune_and_comp", "selector=all", "calibration.samples=4", "model.device=cpu"]
    plans = {}
    for n in (2, 3):
        run = pipeline.Run(composed(tmp_path, *words, f"n_remove={n}"), tmp_path)
        stages = run.prepare()
        plans[n], depth = stages.plan, stages.plan.n_layers
        assert len(stages.patch.output["changed"]) > 0
    assert measured == [depth - 1, depth - 2]
    assert plans[3].order[:2] == plans[2].order
    first, second, _ = plans[3].order
    fits = [first + 1, second + 1 - (first < second)]  # layers that run before the states that a factor is made of
    # each step runs what is left; the fit of two layers, which is not kept, begins with the first one's again
    layers = (depth - 1) + fits[0] + (depth - 2) + sum(fits)
    assert plans[3].provenance["passes"] == pytest.approx(layers / depth, abs=0.051)
    other = pipeline.Run(composed(tmp_path, *words, "n_remove=2", "compensation=mean_update"), tmp_path)
    other.plan(other.calibrate())
    assert measured == [depth - 1, depth - 2, depth - 1]
