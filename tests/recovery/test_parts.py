"""Which parts of a model methods train, after any strategy and on any family."""

from __future__ import annotations

import pytest
import torch
from helpers.hub_mimics import FAMILIES

import svl
from svl.core import Plan, Stats, SvlError
from svl.pruning import surgery
from svl.recovery.distill import Distill
from svl.recovery.interlace import Interlace
from svl.recovery.lora import Lora
from svl.recovery.modules import layers_beside_gaps, nearest_kept
from svl.recovery.projector import Projector
from svl.recovery.student import Student
from svl.strategies.interlace import Interlace as Triplets

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("plan", "beside", "nearest"),
    [
        (Plan(9, (3, 4)), (2, 5), (2, 5)),
        (Plan(9, (0, 8)), (1, 7), (1, 7)),
        (Plan(9, (2, 4)), (1, 3, 5), (3, 5)),
        (Plan(4, (0, 1, 2)), (3,), (3,)),
        (Plan(9, (5,), removed_attn=(2,)), (2, 4, 6), (6,)),
    ],
    ids=str,
)
def test_layers_beside_gaps_and_partners_of_removed_ones(plan, beside, nearest):
    assert layers_beside_gaps(plan) == beside
    assert nearest_kept(plan) == nearest


def test_interlace_trains_the_other_one_of_the_first_two_of_each_triplet(llava):
    """Of layers 0..11, triplets begin at 3 and 7; of their first two layers, 4 and 7 are the more similar ones."""
    cosine = torch.full((13, 13), 0.1)
    for i, j, value in ((3, 6, 0.9), (7, 10, 0.8), (3, 4, 0.2), (4, 5, 0.3), (7, 8, 0.7), (8, 9, 0.5)):
        cosine[i, j] = value

    class Given(Stats):
        def windows(self):
            return cosine

    plan = Triplets().plan(Given(12, tuple(range(12))), 2)
    assert plan.removed == (4, 7)
    assert plan.provenance["partners"] == [3, 8]
    four = Plan(4, (1,), provenance={"partners": [0]})
    parts = Interlace().parts(surgery.apply(llava, four), four)
    assert {name.split("layers.")[1][0] for name in parts.tensors} == {"0"}
    assert Plan.from_json(four.to_json()).provenance["partners"] == [0]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_lora_attaches_to_every_family_or_says_why_not(name, mimic):
    """On tiny checkpoints like those of the hub; the projector is found wherever there is one."""
    lvlm = svl.load(mimic(name), device="cpu", dtype="float32")
    removed = lvlm.anatomy.removable[-1:]
    plan = Plan(lvlm.anatomy.n_layers, removed)
    pruned = surgery.apply(lvlm, plan)
    student = Student(lvlm, plan, None, Distill(rank=2))
    assert {lvlm.anatomy.layer_number(n) for n in student.changes()} - {None} == set(plan.kept)
    if lvlm.takes_images:
        outside = Projector().parts(pruned, plan).tensors
        assert outside
        assert not any(n.startswith(lvlm.anatomy.layers) for n in outside)
        assert sum(dict(pruned.model.named_parameters())[n].numel() for n in outside) < lvlm.parameters() / 2


def test_a_layer_without_linear_modules_is_refused(llava):
    plan = Plan(4, (1,))
    pruned = surgery.apply(llava, plan)
    for name in ("self_attn", "mlp"):
        setattr(pruned.layers[0], name, torch.nn.Identity())
    with pytest.raises(SvlError, match=r"LoRA cannot attach to layer 0 of 'llava'.*recovery=interlace"):
        Lora().parts(pruned, plan)
