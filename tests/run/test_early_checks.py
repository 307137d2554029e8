"""What cannot be on a model is found before the calibration pass; what was not compensated is said."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import pytest
from helpers.families import lvlm_of
from hydra import compose, initialize_config_dir

from svl import config
from svl.calibration import calibrate
from svl.calibration.removal_probe import ModelProbe
from svl.calibration.rescoring import ModelRescoring
from svl.compensation.linear import Linear
from svl.compensation.refit import Refit
from svl.config import CONF
from svl.core import Plan, Stats, SvlError
from svl.pruning import folding
from svl.recovery.base import Parts, Recovery
from svl.run import early_checks, pipeline
from svl.strategies.laco import Laco
from svl.strategies.shortened_magnitude import ShortenedMagnitude
from svl.strategies.swm import Swm


def composed(tmp_path, *words):
    config.register_with_hydra()
    words = [*words, "benchmark=none", "tracker=none", "model.device=cpu"]
    words += [f"paths.store={tmp_path}", f"paths.outputs={tmp_path}", "calibration.samples=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=words)


NAMED = "strategy=manual", "compensation=magnitude"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*NAMED, "strategy.layers=[16]"), r"plan removes layers \[16\], but the model has layers 0\.\.15"),
        ((*NAMED, "strategy.layers=[1]", "strategy.attn=[17]"), r"removed_attn of a plan is \[17\]"),
        ((*NAMED, "strategy.layers=[1]", "model.protect=[1]"), r"removes layers \[1\], which are protected"),
        (
            ("strategy=manual", "strategy.layers=[3]", "strategy.mlp=[2]", "compensation=come"),
            r"compensation=come puts removed layers into layer 2, but the plan takes its mlp",
        ),
        (("strategy=sleb", "strategy.samples=0", "compensation=magnitude"), r"samples is 0, but must be at least 1"),
        (("strategy=lorp", "strategy.protected=[16]"), r"strategy\.protected names layers \[16\], but the model has"),
        (("strategy=lorp", "strategy.clusters=17"), r"strategy\.clusters is 17, but the model has only 16 layers"),
        (
            ("strategy=shortened_ppl", "compensation=linear", "strategy.protected=[-17]"),
            r"strategy\.protected names layers \[-17\], but the model has layers 0\.\.15 \(from the end: -1\.\.-16\)",
        ),
        (("strategy=swm", "compensation=linear", "strategy.highest=16"), r"strategy\.highest is 16, but the model has"),
        (("strategy=laco", "compensation=linear", "strategy.size=17"), r"strategy\.size 17 does not fit between"),
        (
            ("strategy=block_pruner", "compensation=linear", "strategy.targets=[mlp]", "n_remove=9"),
            "18 blocks: only",
        ),
        (
            ("strategy=iterative", "strategy@strategy.of=shortened_ppl", "strategy.of.protected=[16]"),
            r"strategy\.protected names layers \[16\]",
        ),
        (  # six of sixteen are protected
            ("strategy=iterative", "strategy@strategy.of=shortened_ppl", "n_remove=11"),
            r"cannot remove 11 ",
        ),
        (("strategy=sleb", "compensation=magnitude", "n_remove=15"), r"cannot remove 15 "),
        (
            ("strategy=streamline", "model.protect=[7]", "n_remove=9", "selector=all"),
            "no 9 layers in a row may be removed",
        ),
        (
            ("strategy=angular", "model.protect=[7]", "n_remove=8", "selector=all", "strategy.first=9"),
            "no 8 layers in a row may be removed",
        ),
        (
            (*NAMED[:1], "compensation=linear", "strategy.layers=[3]", "strategy.mlp=[5]", "model.offload=true"),
            "model.offload leaves layers on disk: set compensation=none",
        ),
        *(
            (("strategy=shortgpt", f"compensation={name}", "model.offload=true"), f"but {kind} needs it whole in mem")
            for name, kind in (("refit", "Refit"), ("refit_generated", "Refit"), ("come", "Come"))
        ),
        *(
            (("strategy=shortgpt", f"compensation={name}", "model.offload=true"), f"but {kind} gives maps at cuts")
            for name, kind in (("ghosted", "Ghosted"), ("linearpatch", "LinearPatch"))
        ),
        (("strategy=swm", "strategy.highest=3", "n_remove=4"), "merging reaches 3 removed layers only, not 4"),
        (("strategy=laco", "strategy.interval=6", "n_remove=8"), "merging reaches 6 removed layers only, not 8"),
        (("strategy=sublayer_cosine", "strategy.targets=[attn,attn]"), "must name attn and mlp at most once each"),
        (("strategy=block_pruner", "strategy.targets=[mlp,mlp]"), "must name attn and mlp at most once each"),
        (
            ("strategy=shortgpt", "compensation=refit", "compensation.targets=[mlp,mlp]"),
            "must name attn and mlp at most once each",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_cannot_be_costs_no_calibration(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))
    with pytest.raises(SvlError, match=message):
        pipeline.Run(composed(tmp_path, *words), tmp_path).execute()


def test_a_plan_without_a_gap_is_told_not_to_be_compensated(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = "strategy=manual", "strategy.mlp=[2]", "compensation=linear"
    result = pipeline.Run(composed(tmp_path, *words), tmp_path).execute()
    assert (result["compensation"], result["compensated"]) == ("none", [])
    assert result["settings"]["compensation"] == {"_target_": "svl.compensation.none.NoCompensation"}
    assert "no whole layer is removed, so there is no gap to fill: nothing is changed" in caplog.text
    result = pipeline.Run(composed(tmp_path, *words, "strategy.layers=[3]"), tmp_path).execute()
    assert (result["compensation"], result["compensated"]) == ("linear", ["2.attn"])
    result = pipeline.Run(composed(tmp_path, "strategy=identity", "compensation=linear"), tmp_path).execute()
    assert result["compensation"] == "linear"  # of nothing, as it was asked for
    assert "removes nothing" in caplog.text


def test_a_compensation_is_asked_about_a_plan_whatever_is_stored(tmp_path, monkeypatch):
    """Also where calibration need not run, and the plan comes from measurements."""
    words = "strategy=shortgpt", "selector=all", "n_remove=2"
    pipeline.Run(composed(tmp_path, *words, "compensation=none"), tmp_path).execute()

    def refuse(self, plan):
        raise SvlError(f"not without layers {plan.removed}")

    monkeypatch.setattr("svl.compensation.linear.Linear.check_plan", refuse)
    monkeypatch.setattr(pipeline, "fitted_patch", lambda *_: pytest.fail("fitted nevertheless"))
    with pytest.raises(SvlError, match="not without layers"):
        pipeline.Run(composed(tmp_path, *words, "compensation=linear"), tmp_path).execute()


SEARCHES = [
    ("strategy=prune_and_comp", "compensation=magnitude"),
    ("strategy=iterative", "strategy@strategy.of=sleb", "compensation=linear"),
    ("strategy=sleb", "compensation=linear"),
    ("strategy=swm", "compensation=linear"),
]


@pytest.mark.parametrize("words", SEARCHES, ids=" ".join)
def test_a_search_is_not_begun_for_a_compensation_that_is_refused(words, tmp_path, monkeypatch):
    """Also where the statistics are there already, of a run that had another one."""
    pipeline.Run(composed(tmp_path, "strategy=shortgpt", "n_remove=2", "compensation=linear"), tmp_path).calibrate()

    def refuse(lvlm):
        raise SvlError("normalises after its projections")

    monkeypatch.setattr(folding, "check_foldable", refuse)
    for name in ("losses", "similarity"):
        monkeypatch.setattr(ModelProbe, name, lambda *_: pytest.fail("tried nevertheless"))
    monkeypatch.setattr(ModelRescoring, "next_removal", lambda *_: pytest.fail("measured again nevertheless"))
    with pytest.raises(SvlError, match="normalises after"):
        pipeline.Run(composed(tmp_path, *words, "n_remove=2", "selector=tis"), tmp_path).execute()


def test_experts_are_not_refitted():
    """Where every layer has them it is known at once, elsewhere when the plan is."""
    lvlm, _ = lvlm_of("aria")
    for refit in (Refit(), Refit(layers="gaps"), Refit(targets=("mlp",))):
        with pytest.raises(SvlError, match=r"the writer 'mlp' of layer \d has several matrices, but Refit needs one"):
            folding.check_single_somewhere(refit, lvlm.anatomy)
    folding.check_single_somewhere(Refit(targets=("attn",)), lvlm.anatomy)
    lvlm, _ = lvlm_of("llama4")  # every second layer has experts
    folding.check_single_somewhere(Refit(layers="gaps"), lvlm.anatomy)
    single = [writer.single for writer in lvlm.anatomy.writers["mlp"]]
    assert single == [True, False] * 3
    for gone in range(1, 6):
        plan = Plan(6, (gone,))
        if single[gone - 1]:
            folding.check_single(Refit(layers="gaps"), plan, lvlm.anatomy)
        else:
            with pytest.raises(SvlError, match=f"of layer {gone - 1} has several matrices"):
                folding.check_single(Refit(layers="gaps"), plan, lvlm.anatomy)
    with pytest.raises(SvlError, match="of layer 5 has several matrices"):
        folding.check_single(Refit(), Plan(6, (3,)), lvlm.anatomy)
    folding.check_single(Linear(), Plan(6, (3,)), lvlm.anatomy)


def test_layers_that_do_not_exist_cannot_be_protected():
    stats = Stats(16, tuple(range(16)))
    for wrong in (40, 16, -17):
        with pytest.raises(
            SvlError, match=rf"strategy\.protected names layers \[{wrong}\], but the model has layers 0"
        ):
            stats.without((0, wrong))
        with pytest.raises(SvlError, match=r"strategy\.protected names layers"):
            ShortenedMagnitude(protected=(wrong,)).plan(stats, 1)
    assert stats.without((0, 15, -16, -2)).removable == tuple(range(1, 14))


class Unlike:
    """A probe on which nothing is similar once it is merged."""

    def with_samples(self, n):
        return self

    def similarity(self, plan, patch):
        return -1.0


@pytest.mark.parametrize("strategy", [Laco(threshold=0.9, size=2), Swm(threshold=0.9)], ids=str)
def test_a_threshold_that_nothing_passes_is_told(strategy, caplog):
    assert strategy.plan(Stats(4, (0, 1, 2, 3), probe=Unlike()), 2).removed == ()
    assert "no merge stays above a similarity of 0.9, so nothing is removed" in caplog.text


def test_no_layer_to_remove_needs_no_room_for_a_merge():
    assert Laco(size=2).plan(Stats(2, (0, 1), probe=Unlike()), 0) == Plan(2, ())
    assert Swm().plan(Stats(2, (0, 1), probe=Unlike()), 0) == Plan(2, ())
    with pytest.raises(SvlError, match="size 2 does not fit"):
        Laco(size=2).plan(Stats(2, (0, 1), probe=Unlike()), 1)


CALIBRATED = ("strategy=shortgpt", "compensation=linear")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("recovery=projector", "recovery.modules=[model.nothing]"), r"'model\.nothing', but .* has no such module"),
        (("recovery=projector", "recovery.modules=[{layers}.3]"), r"decoder layers \('.*layers'\) are trained by"),
        (("recovery=distill", "recovery.targets=mlps"), r"recovery\.targets"),
        (("recovery=lora", "model.dtype=float16"), r"not in float16: set model\.dtype=bfloat16"),
        (
            ("recovery=projector", "recovery.data.path=${{svl:demo}}/text/calibration.jsonl"),
            r"trains the projector alone, but no sample of recovery\.data has a picture",
        ),
        (
            ("recovery=lora", "recovery.data.path={silent}", "recovery.data.columns={{image: null}}"),
            r"recovery needs answers, but 2 samples have none",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
@pytest.mark.parametrize("strategy", [CALIBRATED, (*NAMED, "strategy.layers=[3,5]"), ("strategy=sleb", NAMED[1])])
def test_what_cannot_be_trained_costs_no_stage(strategy, words, message, tmp_path, monkeypatch):
    """Neither statistics nor trial removals nor a compensation."""
    pytest.importorskip("peft")
    store, silent = tmp_path / "store", tmp_path / "silent.jsonl"
    silent.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in ("what is it", "where")))
    words = [word.format(layers="model.language_model.layers", silent=silent) for word in words]
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("calibrated nevertheless"))
    with pytest.raises(SvlError, match=message):
        pipeline.run_configuration(composed(store, *strategy, *words), store)
    assert not list(store.glob("patch/*"))


@pytest.mark.parametrize("stage", ["patch", "texts", "overlap"])
def test_what_cannot_be_trained_costs_no_stage_behind_those_that_are_stored(stage, tmp_path, monkeypatch):
    """Statistics, plan and check may be those of a run without recovery."""
    prune = ("strategy=shortgpt", "n_remove=2")
    pipeline.run_configuration(composed(tmp_path, *prune), tmp_path)
    stored = set(tmp_path.glob(f"{stage}/*"))
    compensation = {"patch": "linear", "texts": "refit_generated", "overlap": "none"}[stage]
    words = (f"compensation={compensation}", "recovery=projector", "recovery.modules=[model.nothing]")
    with pytest.raises(SvlError, match="has no such module"):
        pipeline.run_configuration(composed(tmp_path, *prune, *words), tmp_path)
    assert set(tmp_path.glob(f"{stage}/*")) == stored


def test_recovery_is_asked_about_the_pruned_model(tmp_path):
    @dataclass(frozen=True)
    class Norms(Recovery):
        """Numbers of layers are those of the model that is given."""

        def parts(self, pruned, plan):
            pairs = zip(plan.kept, pruned.layers, strict=True)
            layers = pruned.anatomy.layers
            return Parts(tuple(f"{layers}.{new}.input_layernorm.weight" for new, _ in enumerate(pairs)))

    run = pipeline.Run(composed(tmp_path, "strategy=shortgpt", "recovery=projector"), tmp_path)
    run.setup.recovery = Norms()
    early_checks.check_recovery(run.setup)
    assert "recovery" in run.setup.tried


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recovery=none", "recovery.steps=10"], "recovery.steps has no effect: recovery=none trains nothing"),
        (["recovery=none", "recovery.data.path=nowhere.json"], "recovery.data has no effect"),
        (["recovery=none"], None),
        (["recovery=projector", "recovery.steps=0"], None),
    ],
    ids=str,
)
def test_settings_of_a_forgotten_recovery_are_told(words, told, tmp_path, caplog):
    """In a run of its own; a sweep over recovery=none,lora needs them."""
    for sweep in (None, tmp_path):
        caplog.clear()
        pipeline.run_configuration(composed(tmp_path, "strategy=tail", *words), tmp_path, sweep)
        assert ("has no effect" in caplog.text) == (told is not None and sweep is None)
        assert sweep is not None or (told or "") in caplog.text


def test_nothing_is_removed_so_nothing_that_is_trained_is_checked(tmp_path):
    words = ("recovery=projector", "recovery.modules=[model.nothing]")
    pipeline.run_configuration(composed(tmp_path, "strategy=shortgpt", "ratio=0", *words), tmp_path)
