"""Padding on the left moves no token of a model that looks positions up by index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from svl.calibration.hooks import run_decoder
from svl.config import PACKAGE
from svl.core import Plan
from svl.data.samples import Sample, Samples
from svl.evaluation.perplexity import evaluate_perplexity
from svl.evaluation.settings import TaskOptions
from svl.evaluation.shared_prefill import SharedPrefill
from svl.models.anatomy import find_anatomy
from svl.models.lvlm import Lvlm
from svl.models.positions import looked_up_positions
from svl.recovery.base import Losses, Parts, Recovery
from svl.recovery.batches import Batches
from svl.recovery.student import Student

TEXTS = ["is there a green square", "a red circle", "start at the purple cross go down what color is it are there more"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PACKAGE / "demo" / "demo_lvlm")


@pytest.fixture(scope="module")
def gpt2(tokenizer) -> Lvlm:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    return Lvlm(model, tokenizer, find_anatomy(model, layers="transformer.h"))


def test_calibration_sees_in_a_batch_what_it_sees_alone(gpt2):
    with torch.inference_mode():
        together = run_decoder(gpt2, gpt2.encode(TEXTS), all_logits=True).logits
        for i, text in enumerate(TEXTS):
            alone = run_decoder(gpt2, gpt2.encode([text]), all_logits=True).logits[0]
            assert torch.allclose(together[i, -len(alone) :], alone, atol=1e-4)


def test_likelihoods_in_a_batch_are_those_alone(gpt2):
    together = dict(SharedPrefill([gpt2]).logits(gpt2.encode(TEXTS), 1))[0]
    for i, text in enumerate(TEXTS):
        assert torch.allclose(together[i], dict(SharedPrefill([gpt2]).logits(gpt2.encode([text]), 1))[0][0], atol=1e-4)


def test_losses_do_not_depend_on_the_batch_size(gpt2, tmp_path: Path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    body = {"task": "texts", "output_type": "perplexity", "dataset_path": "json", "metric_list": [{"metric": "loss"}]}
    body["dataset_kwargs"] = {"data_files": "texts.jsonl"}
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(body))
    one, all_at_once = (
        evaluate_perplexity(gpt2, "texts", TaskOptions("loss", batch_size=n, include_path=str(tmp_path)), tmp_path)
        for n in (1, 3)
    )
    assert one["metrics"]["loss"]["value"] == pytest.approx(all_at_once["metrics"]["loss"]["value"], rel=1e-5)


class OneNorm(Recovery):
    """GPT-2 has no linear modules for `distill`."""

    losses = Losses(answers=0.5, states=0.5)

    def parts(self, pruned: Lvlm, plan: Plan) -> Parts:
        return Parts(("transformer.h.2.ln_1.weight",))


def test_recovery_loses_in_a_batch_what_it_loses_alone(gpt2):
    """By their numbers of predicted tokens, on answers and on states, which see positions, too."""
    samples = Samples("x", tuple(Sample(i, text, plain=True) for i, text in enumerate(TEXTS)))
    student = Student(gpt2, Plan(4, (2,)), None, OneNorm())
    batches, lengths = Batches(student.lvlm, samples), [len(gpt2.tokenizer(text)["input_ids"]) for text in TEXTS]
    alone = []
    for i in range(len(TEXTS)):
        student(**batches([i]))
        alone.append(student.take_terms())
    student(**batches(range(len(TEXTS))))
    together = student.take_terms()
    for name, counts in (("answers", [n - 1 for n in lengths]), ("states", lengths)):
        mean = sum(n * terms[name] for n, terms in zip(counts, alone, strict=True)) / sum(counts)
        assert together[name] == pytest.approx(mean, rel=1e-4)


def test_models_with_rotary_attention_are_given_nothing(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    llama = Lvlm(model, tokenizer, find_anatomy(model))
    assert looked_up_positions(llama, llama.encode(TEXTS)) == {}
