"""What recovery has trained, applied in memory and on export."""

from __future__ import annotations

import pytest
import torch
from helpers.checkpoints import assert_same_checkpoint, in_memory
from safetensors.torch import save_file

import svl
from svl.core import Patch, Plan, SvlError, TensorChange, Update
from svl.pruning.patch_file import load_trained, save_trained
from svl.pruning.surgery import apply
from svl.pruning.trained import change_tensor

CHANCE = torch.Generator().manual_seed(7)
PLAN = Plan(4, (0, 2))


def chance(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=CHANCE) / 6


def trained(lvlm) -> dict[str, TensorChange]:
    """One change of every kind: of a matrix by a product and as a whole, of a norm, of something outside the layers."""
    layers, parameters = lvlm.anatomy.layers, dict(lvlm.model.named_parameters())
    query = f"{layers}.1.self_attn.q_proj.weight"
    down, norm = f"{layers}.3.mlp.down_proj.weight", f"{layers}.3.input_layernorm.weight"
    outside = next((name for name in parameters if "projector" in name or "merger" in name), "model.norm.weight")
    found = {query: TensorChange(left=chance(parameters[query].shape[0], 3), right=chance(3, 32))}
    return found | {name: TensorChange(chance(*parameters[name].shape)) for name in (down, norm, outside)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_in_double_precision_up_to_rounding(dtype):
    weight, left, right = (chance(*shape).to(dtype) for shape in ((40, 700), (40, 5), (5, 700)))
    expected = weight.double() + left.double() @ right.double()
    result = change_tensor(weight, TensorChange(left=left.float(), right=right.float()))
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_trained_tensors_take_the_place_of_what_compensation_left(lm):
    changes = trained(lm)
    patch = Patch({(3, "mlp"): Update(scale=0.5), (1, "attn"): Update(scale=0.5)}, trained=changes)
    dense, pruned = (dict(model.named_parameters()) for model in (lm.model, apply(lm, PLAN, patch).model))
    for name, change in changes.items():
        new = name.replace(f"{lm.anatomy.layers}.1.", "LAYERS.0.").replace(f"{lm.anatomy.layers}.3.", "LAYERS.1.")
        found = pruned[new.replace("LAYERS", lm.anatomy.layers)]
        if change.value is not None:
            assert torch.equal(found, change.value)
        else:
            torch.testing.assert_close(found, dense[name] + change.left @ change.right)
    other = f"{lm.anatomy.layers}.1.self_attn.o_proj.weight"
    assert torch.equal(pruned[other.replace(".1.", ".0.", 1)], 0.5 * dense[other])


@pytest.mark.parametrize("kind", ["llava", "qwen", "llama"])
def test_exports_are_the_models_in_memory_bit_for_bit(kind, checkpoint, tmp_path):
    lvlm = svl.load(checkpoint(kind), device="cpu")
    patch = Patch({(3, "mlp"): Update(scale=0.5)}, trained=trained(lvlm))
    exported = svl.save(checkpoint(kind), PLAN, tmp_path / "exported", patch)
    assert_same_checkpoint(exported, in_memory(lvlm, PLAN, patch, tmp_path / "memory"))
    record = svl.load(exported, device="cpu").model.config.layer_pruning
    assert f"{lvlm.anatomy.layers}.3" in record["trained"]
    assert "trained" in record
    assert record["compensated"] == ["3.mlp"]


def test_files_give_back_what_was_saved(llava, tmp_path):
    changes = trained(llava)
    save_trained(changes, tmp_path / "trained.safetensors")
    again = load_trained(tmp_path / "trained.safetensors")
    assert again.keys() == changes.keys()
    for name, change in changes.items():
        for part in ("value", "left", "right"):
            ours, theirs = getattr(again[name], part), getattr(change, part)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    save_file({"something": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SvlError, match="'something' is not named <name>:<part of a change>"):
        load_trained(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.language_model.layers.2.mlp.up_proj.weight": TensorChange(torch.ones(48, 32))}, "does not have"),
        ({"model.nothing.weight": TensorChange(torch.ones(1))}, "trained 'model.nothing.weight', which the pruned"),
        ({"lm_head.weight": TensorChange(torch.ones(2, 2))}, r"has shape \(2, 2\), but must have"),
        ({"lm_head.weight": TensorChange()}, "either all"),
        ({"lm_head.weight": TensorChange(left=torch.ones(2, 2))}, "either all"),
        ({"model.language_model.norm.weight": TensorChange(torch.full((32,), torch.nan))}, "finite numbers"),
        (
            {"model.language_model.norm.weight": TensorChange(left=torch.ones(32, 1), right=torch.ones(1, 32))},
            "it is no matrix",
        ),
    ],
)
def test_changes_that_do_not_fit_are_refused(change, message, llava):
    with pytest.raises(SvlError, match=message):
        apply(llava, PLAN, Patch(trained=change))
