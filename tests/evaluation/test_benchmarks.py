"""Finding benchmarks, their fingerprints, and what is checked from their files alone."""

from __future__ import annotations

import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.tasks import DEMO, TASKS, benchmark, task_folder
from hydra import compose, initialize_config_dir

from svl import config
from svl.core import SvlError
from svl.evaluation import benchmarks
from svl.evaluation.settings import TaskOptions

pytest.importorskip("lmms_eval")
config.register_with_hydra()


def test_fingerprint_follows_content(tmp_path):
    before = benchmarks.benchmark_fingerprint("svl_demo_open", TASKS)
    shutil.copytree(DEMO, tmp_path / "demo")
    folder = tmp_path / "demo" / "tasks"
    seen = [benchmarks.benchmark_fingerprint("svl_demo_open", str(folder))]
    assert seen == [before]  # wherever it lies
    for name in ("svl_demo_open.yaml", "_common.yaml", "utils.py", "../data/open.parquet"):
        with open(folder / name, "ab") as file:
            file.write(b"\n")
        seen.append(benchmarks.benchmark_fingerprint("svl_demo_open", str(folder)))
    assert len(set(seen)) == 5
    (folder / "svl_demo_choice.yaml").write_text("task: other\n")
    assert benchmarks.benchmark_fingerprint("svl_demo_open", str(folder)) == seen[-1]


def test_shipped_benchmarks_are_found():
    assert benchmarks.find_task("pope", None).name == "pope.yaml"
    assert benchmarks.benchmark_fingerprint("pope", None) != benchmarks.benchmark_fingerprint("mme", None)
    with pytest.raises(SvlError, match="did you mean 'scienceqa_img'"):
        benchmarks.benchmark_fingerprint("sciencqa_img", None)


def test_metric_is_checked_from_the_yaml_alone():
    benchmarks.check_metric("svl_demo_existence", "f1", str(TASKS))
    with pytest.raises(SvlError, match=r"svl_demo_existence\.metric is 'fi1'.*did you mean 'f1'"):
        benchmarks.check_metric("svl_demo_existence", "fi1", str(TASKS))


def test_keys_follow_the_copy(tmp_path):
    copy = tmp_path / "POPE" / "data"
    copy.mkdir(parents=True)
    (copy / "test.parquet").write_bytes(b"one")
    prints = [benchmarks.benchmark_fingerprint("svl_pope", None, data) for data in (None, str(tmp_path))]
    (copy / "test.parquet").write_bytes(b"two")
    prints.append(benchmarks.benchmark_fingerprint("svl_pope", None, str(tmp_path)))
    assert len(set(prints)) == 3


def test_metrics_and_styles_are_checked_before_anything_is_loaded():
    benchmarks.check_metric("svl_pope", "upstream_pope_f1_score", None)
    benchmarks.check_metric("svl_scienceqa", "exact_match", None)
    benchmarks.check_style("svl_scienceqa", "qwen_vl", None)
    with pytest.raises(SvlError, match="did you mean 'f1'"):
        benchmarks.check_metric("svl_pope", "fi1", None)
    with pytest.raises(SvlError, match="did you mean 'qwen_vl'"):
        benchmarks.check_style("svl_scienceqa", "qwen-vl", None)


def test_any_task_of_lmms_eval_can_be_named_as_the_page_says():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (words,) = re.findall(r"`(benchmark=none '\+benchmark\.tasks=.*')`", page)
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", overrides=shlex.split(words))
    config.validate_config(cfg)
    ((task, chosen),) = cfg.benchmark.tasks.items()
    benchmarks.check_metric(task, chosen.metric, None)


def test_the_papers_average():
    tasks = benchmark("paper6").tasks
    assert list(tasks) == [f"svl_{n}" for n in ("aokvqa", "scienceqa", "mme", "pope", "mmbench", "seedbench")]
    dense = dict(zip(tasks, (0.779, 0.656, 1246.4, 0.848, 0.643, 0.654), strict=True))
    average = statistics.mean(score / tasks[task].scale for task, score in dense.items())
    assert 100 * average == pytest.approx(70.1, abs=0.05)  # the published row of LLaVA-1.5-7B


# ----------------------------------------------------------------------------------------- checks before a run


def own_task(folder: Path, body: str) -> TaskOptions:
    """How to score a task `custom` of one's own whose YAML ends so."""
    task_folder(folder / "tasks", body, [{"prompt": "?", "answer": "!", "kind": "x"}])
    return TaskOptions("accuracy", include_path=str(folder / "tasks"))


def test_examples_for_questions_on_images_are_refused(tmp_path):
    options = own_task(tmp_path, "num_fewshot: 3\ndoc_to_visual: image\n")
    with pytest.raises(SvlError, match=r"task 'custom' asks for num_fewshot: 3, but questions on images"):
        benchmarks.check_task("custom", options)


def test_examples_need_a_sampler(tmp_path):
    with pytest.raises(SvlError, match=r"num_fewshot needs fewshot_config: {sampler: default}"):
        benchmarks.check_task("custom", own_task(tmp_path, "num_fewshot: 3\n"))


def test_sampling_settings_that_do_not_count_are_named(tmp_path, caplog):
    settings = "{do_sample: true, temperature: 0.7, num_beams: 1, max_new_tokens: 9}"
    benchmarks.check_task("custom", own_task(tmp_path, f"generation_kwargs: {settings}\n"))
    (record,) = caplog.records
    assert "custom: answers are always greedy, so do_sample: True, temperature: 0.7 does not count" in record.message


def test_the_tasks_of_svl_need_no_warning(caplog):
    for name in ("all", "demo", "smol", "prose"):
        chosen = benchmark(name)
        for task, settings in chosen.tasks.items():
            benchmarks.check_task(task, TaskOptions(settings.metric, include_path=chosen.include_path))
    assert not caplog.records


def test_tasks_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(SvlError, match=r"output_type of task 'custom' is 'generate_until_multi_round', but must be"):
        benchmarks.check_task("custom", own_task(tmp_path, "output_type: generate_until_multi_round\n"))


@pytest.mark.parametrize("kind", ["perplexity", "multiple_choice", "loglikelihood"])
def test_what_vllm_does_not_give_is_refused(kind, tmp_path):
    folder = own_task(tmp_path, f"output_type: {kind}\n").include_path
    with pytest.raises(SvlError, match=rf"'custom' asks for {kind} .*, but evaluator=vllm gives only generate_until"):
        benchmarks.check_evaluator("custom", folder, "vllm")
    benchmarks.check_evaluator("custom", folder, "transformers")


def test_data_that_cannot_be_had_are_named_with_the_way_out(tmp_path, monkeypatch):
    def unreachable(path, name, **options):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    message = r"task 'svl_pope': the data set lmms-lab.*POPE cannot be had: Couldn't reach .*set benchmark\.data to a"
    with pytest.raises(SvlError, match=message):
        benchmarks.check_data("svl_pope", TaskOptions("f1"))
    (tmp_path / "POPE").mkdir()
    benchmarks.check_data("svl_pope", TaskOptions("f1", data=str(tmp_path)))  # a copy: the hub is not asked
    with pytest.raises(SvlError, match=r"benchmark\.data: .* has no folder 'MME'"):
        benchmarks.check_data("svl_mme", TaskOptions("perception", data=str(tmp_path)))


@pytest.mark.parametrize(
    ("task", "metric", "is_higher"),
    [
        *(("svl_prose_fiction", metric, False) for metric in ("loss", "perplexity", "bits_per_byte")),
        *(("svl_demo_existence", metric, metric not in ("off_format", "yes_ratio"))
            for metric in ("accuracy", "f1", "off_format", "yes_ratio", "likelihood_accuracy")),
        *(("svl_pope", metric, metric != "off_format") for metric in ("f1", "off_format", "upstream_pope_f1_score")),
    ],
)  # fmt: skip
def test_the_direction_of_a_metric_is_its_tasks(task, metric, is_higher):
    folder = str(DEMO) if "pope" not in task else None
    assert benchmarks.higher_is_better(task, metric, folder) is is_higher
    benchmarks.check_direction(task, metric, None, folder)
    benchmarks.check_direction(task, metric, is_higher, folder)
    with pytest.raises(SvlError, match=f"set it to {str(is_higher).lower()}, or to null"):
        benchmarks.check_direction(task, metric, not is_higher, folder)


def test_both_parts_of_a_data_set_are_looked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name, **options: asked.append(name))
    benchmarks.check_data("svl_gqa", TaskOptions("exact_match"))
    assert asked == ["testdev_balanced_instructions", "testdev_balanced_images"]


@pytest.mark.parametrize("token", [None, "hf_of_a_user"])
def test_public_data_need_no_login(token, monkeypatch):
    """lmms-eval's tasks ask for one with all data; with a login, gated ones can be had."""
    asked = {}
    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name, **options: asked.update(options))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert benchmarks.task_settings("svl_pope", None)["dataset_kwargs"]["token"] is True
    benchmarks.check_data("svl_pope", TaskOptions("f1"))
    assert asked.get("token") is (True if token else None)


def test_files_of_a_task_of_ones_own_must_exist(tmp_path):
    options = own_task(tmp_path, "")
    benchmarks.check_data("custom", options)
    (tmp_path / "tasks" / "data.json").unlink()
    with pytest.raises(SvlError, match="task 'custom' has no data"):
        benchmarks.check_data("custom", options)
