"""What a method of recovery answers wrongly is one line that names it, before anything is trained."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from svl.core import Plan, SvlError
from svl.doctor.recovery_checks import asked_training
from svl.pruning import surgery
from svl.recovery.base import Adapter, Losses, Parts, Recovery
from svl.recovery.contract import checked_parts

PLAN = Plan(4, (1,))
LAYERS = "model.language_model.layers"
NORM, QUERY = f"{LAYERS}.2.input_layernorm", f"{LAYERS}.2.self_attn.q_proj"


@dataclass(frozen=True)
class Own(Recovery):
    """Answers what it is told to."""

    answer: Any = field(default_factory=lambda: Parts((f"{NORM}.weight",), (QUERY,)))
    told: Any = field(default_factory=lambda: Losses)
    adapting: Any = field(default_factory=lambda: Adapter)

    @property
    def losses(self):
        return self.told()

    @property
    def adapter(self):
        return self.adapting()

    def parts(self, pruned, plan):
        return self.answer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": None}, "gives NoneType as parts, but must give Parts"),
        ({"answer": [f"{NORM}.weight"]}, "gives list as parts, but must give Parts"),
        ({"answer": Parts("a.string")}, "gives 'a.string' as Parts.tensors, but must give a tuple of names"),
        ({"answer": Parts((1,))}, "gives (1,) as Parts.tensors, but must give a tuple of names"),
        ({"answer": Parts((), [QUERY])}, f"gives ['{QUERY}'] as Parts.adapted, but must give a tuple"),
        (
            {"answer": Parts((f"{LAYERS}.3.input_layernorm.weight",))},
            f"trains '{LAYERS}.3.input_layernorm.weight', but what is left of 'llava' (layers 0..2 of '{LAYERS}')",
        ),
        ({"answer": Parts((f"{NORM}.wieght",))}, f"has no such parameter (did you mean '{NORM}.weight'?)"),
        ({"answer": Parts((f"{NORM}.weight",) * 2)}, "which are one parameter: name it once"),
        ({"answer": Parts((), (f"{QUERY}s",))}, f"has no such module (did you mean '{QUERY}'?)"),
        ({"answer": Parts((), (NORM,))}, f"adapts '{NORM}', which is LlamaRMSNorm: only linear modules can be adapted"),
        ({"answer": Parts((f"{QUERY}.weight",), (QUERY,))}, "and trains its weight as a whole"),
        ({"answer": Parts((), (QUERY, QUERY))}, "twice"),
        ({"answer": Parts()}, "has nothing to train in 'llava'"),
        ({"told": lambda: None}, "gives NoneType as losses, but must give Losses"),
        ({"told": lambda: Losses(answers=0)}, "Own: all losses (answers, logits, states) have the weight 0"),
        ({"told": lambda: Losses(states=-1)}, "Own: the weight of the loss 'states' is -1, but must be at least 0"),
        (
            {"told": lambda: Losses(logits=math.nan)},
            "Own: the weight of the loss 'logits' is nan, but must be",
        ),
        (
            {"told": lambda: Losses(temperature=0)},
            "Own: the temperature of the loss 'logits' is 0, but must be",
        ),
        ({"adapting": lambda: 16}, "gives int as adapter, but must give Adapter"),
        ({"adapting": lambda: Adapter(rank=0)}, "Own: the rank of adapters is 0, but must be at least 1"),
        ({"adapting": lambda: Adapter(dropout=1.0)}, "Own: the dropout of adapters is 1, but must be"),
    ],
)
def test_what_a_method_answers_wrongly_is_one_line(settings, message, llava):
    pruned = surgery.apply(llava, PLAN)
    assert checked_parts(Own(), pruned, PLAN) == Own().answer
    with pytest.raises(SvlError) as caught:
        checked_parts(Own(**settings), pruned, PLAN)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Own" in str(caught.value)


def test_a_tied_tensor_is_named_once(llama):
    lvlm = replace(llama, model=copy.deepcopy(llama.model))
    lvlm.model.lm_head.weight = lvlm.model.model.embed_tokens.weight
    names = ("lm_head.weight", "model.embed_tokens.weight")
    with pytest.raises(SvlError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight', which are one parameter"):
        checked_parts(Own(answer=Parts(names)), surgery.apply(lvlm, PLAN), PLAN)


def test_the_doctor_counts_what_is_left(llava):
    """Of three of four layers."""

    @dataclass(frozen=True)
    class Norms(Recovery):
        def parts(self, pruned, plan):
            pairs = list(zip(plan.kept, pruned.layers, strict=True))
            return Parts(tuple(f"{LAYERS}.{new}.input_layernorm.weight" for new in range(len(pairs))))

    width = llava.anatomy.hidden_size
    assert asked_training(llava, Norms(), 1, None).parameters == 3 * width
