"""Which parts of a model methods train, after any strategy and on any family."""

from __future__ import annotations

import pytest
import torch
from helpers.families import SUPPORTED, lvlm_of
from helpers.hub_mimics import FAMILIES

import svl
from svl.core import Patch, Plan, Stats, SvlError
from svl.pruning import surgery
from svl.pruning.trained import check_trained
from svl.recovery.distill import Distill
from svl.recovery.interlace import Interlace
from svl.recovery.lora import Lora
from svl.recovery.modules import layer_tensors, layers_beside_gaps, linear_modules, nearest_kept, projector_tensors
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
        def windows(self, over="tokens"):
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


PROJECTORS = {  # what stands between tower and decoder, where it is not `model.multi_modal_projector`
    **dict.fromkeys(("deepseek_vl", "janus"), ("model.aligner",)),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), ("model.connector",)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "glm4v"), ("model.visual.merger",)),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), ("model.visual.merger", "model.visual.deepstack_merger_list")),
    **dict.fromkeys(("blip2", "instructblip"), ("query_tokens", "qformer", "language_projection")),
    "ovis2": ("model.visual_embeddings_table",),
    "mplug_owl2": ("model.visual_abstractor",),
    "gemma4": ("model.embed_vision",),
    "llama4": ("multi_modal_projector", "vision_model.vision_adapter"),
    "phi4_multimodal": (
        "model.embed_tokens_extend.image_embed.img_projection_up",
        "model.embed_tokens_extend.image_embed.img_projection_down",
    ),
    "fuyu": ("model.vision_embed_tokens",),
    "kosmos2_5": ("image_to_text_projection",),
}


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_projector_of_every_family(family):
    """All of it, and nothing of tower or decoder."""
    lvlm, _ = lvlm_of(family)
    if not lvlm.takes_images:
        return
    roots = PROJECTORS.get(family, ("model.multi_modal_projector",))
    every = [name for name, _ in lvlm.model.named_parameters()]
    wanted = {name for name in every if any(name == root or name.startswith(f"{root}.") for root in roots)}
    assert set(projector_tensors(lvlm)) == wanted
    assert all(any(name.startswith(root) for name in wanted) for root in roots)


@pytest.mark.parametrize("family", ["lfm2_vl", "llama4", "kosmos2_5", "blip2", "qwen3_vl_moe", "mllama"])
def test_linear_modules_go_by_what_a_block_does(family):
    """Attentions, or what stands in their place, and MLPs share out all of them, whatever their names."""
    lvlm, _ = lvlm_of(family)
    plan = Plan(lvlm.anatomy.n_layers, ())
    every, attn, mlp = (set(linear_modules(lvlm, plan, plan.kept, targets)) for targets in ("all", "attn", "mlp"))
    assert every == attn | mlp
    assert attn
    assert not attn & mlp
    assert {path.split(".")[-2] for path in attn} <= {"self_attn", "cross_attn", "conv", "in_proj", "q_proj"}
    for path in every:  # a router that only inherits from Linear is none
        assert type(lvlm.model.get_submodule(path)).forward is torch.nn.Linear.forward


@pytest.mark.parametrize("recovery", [Lora(rank=2), Distill(rank=2), Interlace()], ids=lambda r: type(r).__name__)
def test_removed_sublayers_are_not_trained(recovery, llava):
    """Attention of layer 0 stays as zeros, that of layer 2 and the MLP of 3 are left out."""
    plan = Plan(4, (1,), removed_attn=(0, 2), removed_mlp=(3,))
    student = Student(llava, plan, None, recovery)
    trained = [name for name in student.changes() if "layers" in name and "language_model" in name]
    gone = ("layers.0.self_attn", "layers.2.self_attn", "layers.3.mlp")
    assert trained
    assert not [name for name in trained if any(block in name for block in gone)]
    assert Lora(targets="attn").parts(surgery.apply(llava, plan), plan).adapted  # that of layer 3


@pytest.mark.parametrize(
    "family", ["llava", "gemma3", "glm4v", "cohere2_vision", "lfm2_vl", "blip2", "kosmos2_5", "qwen3_vl_moe"]
)
def test_everything_that_is_trained_has_an_effect(family):
    """Beside a missing block, its norms have none; a norm that attention and MLP share has."""
    lvlm, made = lvlm_of(family)
    n = lvlm.anatomy.n_layers
    plan = Plan(n, (), removed_attn=(n - 2,), removed_mlp=(n - 1,))
    pruned = surgery.apply(lvlm, plan)
    prefixes = tuple(f"{pruned.anatomy.layers}.{i}." for i in (n - 2, n - 1))
    own = {}
    for name, parameter in list(pruned.model.named_parameters()):
        parameter.requires_grad_(False)
        if name.startswith(prefixes) and bool(parameter.any()):  # zeros: what is left of a removed block
            own[name] = torch.nn.Parameter(parameter.detach().clone())
            surgery.set_tensor(pruned.model, name, own[name])
    pruned.model(**made.inputs, use_cache=False).logits.sin().sum().backward()
    reached = {name for name, p in own.items() if p.grad is not None and bool(p.grad.abs().max() > 1e-9)}
    trained = {name for name in layer_tensors(pruned, plan, (n - 2, n - 1)) if name in own}
    shifts = {name for name in own if "k_proj.bias" in name}  # which the softmax does not see
    assert trained - shifts == reached - shifts


def test_maps_at_cuts_are_not_trained(llava):
    """They are no part of the dense model, which training's results are told of."""
    plan = Plan(4, (1,))
    student = Student(llava, plan, Patch(maps={1: torch.eye(32)}), Interlace())
    check_trained(student.changes(), plan, llava.anatomy, llava.model)
    assert any("layers.2." in name for name in student.changes())


def test_a_layer_without_linear_modules_is_refused(llava):
    plan = Plan(4, (1,))
    pruned = surgery.apply(llava, plan)
    for name in ("self_attn", "mlp"):
        setattr(pruned.layers[0], name, torch.nn.Identity())
    with pytest.raises(SvlError, match=r"LoRA cannot attach to layer 0 of 'llava'.*recovery=interlace"):
        Lora().parts(pruned, plan)
