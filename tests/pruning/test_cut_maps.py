"""Models with maps at their cuts: what they compute, how they are counted, kept and refused."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from helpers.families import SUPPORTED, generate, lvlm_of
from helpers.references import close, compensated, logits, together

from svl.checkpoints import export
from svl.checkpoints.pruning_record import changed_writers
from svl.compensation.ghosted import Ghosted
from svl.compensation.linear import Linear
from svl.core import Patch, Plan, SvlError, checked_patch
from svl.evaluation import efficiency
from svl.evaluation.settings import EfficiencySettings
from svl.pruning.patch_file import load_patch, save_patch
from svl.pruning.surgery import apply


def matrix(width: int = 32, seed: int = 0) -> torch.Tensor:
    """Near the identity, and not symmetric."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return torch.eye(width) + noise / (2 * width**0.5)


def mapped_plan(lvlm, *runs: tuple[int, int]) -> tuple[Plan, Patch]:
    removed = tuple(i for start, stop in runs for i in range(start, stop))
    return Plan(lvlm.anatomy.n_layers, removed), Patch(maps={start: matrix(seed=start) for start, _ in runs})


@pytest.mark.parametrize("runs", [[(1, 3)], [(0, 1), (2, 3)], [(0, 2), (3, 4)]], ids=str)
def test_generation_with_and_without_cache_is_that_of_the_mapped_dense_model(runs, lm, samples, encode):
    plan, patch = mapped_plan(lm, *runs)
    pruned, inputs = apply(lm, plan, patch), encode(lm, samples.samples[:3])
    with compensated(lm, plan, patch) as reference:
        close(logits(pruned.model, inputs), logits(reference, inputs))
        words, numbers = generate(reference, inputs)
    found, same = generate(pruned.model, inputs)
    assert torch.equal(found, words)
    close(same, numbers)
    assert (logits(pruned.model, inputs) - logits(apply(lm, plan).model, inputs)).abs().max() > 0.1


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_reads_what_the_map_makes_of_the_stream(family):
    """Norms behind projections do not matter to a map of the stream, nor do visual features that enter before it."""
    lvlm, made = lvlm_of(family)
    gone = lvlm.anatomy.removable[len(lvlm.anatomy.removable) // 2]
    for runs in ([(gone, gone + 1)], [(lvlm.anatomy.removable[0], lvlm.anatomy.removable[0] + 1)]):
        plan, patch = mapped_plan(lvlm, *runs)
        start, stop = runs[0]

        def grow(_, args, kwargs, out, matrix=patch.maps[start]):
            state = (args[0] if args else kwargs["hidden_states"]) @ matrix.T
            return (state, *out[1:]) if isinstance(out, tuple) else state

        handle = lvlm.layers[stop - 1].register_forward_hook(grow, with_kwargs=True)
        expected = logits(lvlm.model, made.inputs)
        handle.remove()
        close(logits(apply(lvlm, plan, patch).model, made.inputs), expected)


def test_the_dense_model_and_copies_are_their_own(llava, samples, encode):
    inputs = encode(llava, samples.samples[:2])
    before = logits(llava.model, inputs)
    plan, patch = mapped_plan(llava, (1, 2))
    pruned = apply(llava, plan, patch)
    expected = logits(pruned.model, inputs)
    assert torch.equal(logits(llava.model, inputs), before)
    copied = replace(pruned, model=copy.deepcopy(pruned.model))
    with torch.no_grad():
        for name, parameter in copied.model.named_parameters():
            if parameter.shape == (32, 32) and "map" in name:
                parameter.zero_()
    assert torch.equal(logits(pruned.model, inputs), expected)
    assert not torch.equal(logits(copied.model, inputs), expected)
    again = apply(pruned, Plan(3, ()))  # as quantization and visual_tokens do
    assert torch.equal(logits(again.model, inputs), expected)
    with pytest.raises(SvlError, match="has maps at its cuts: prune the dense model"):
        apply(pruned, Plan(3, (2,)))


def test_half_precision_maps_in_full(llama):
    """The product is in fp32, and the stream stays what it was."""
    half = replace(llama, model=copy.deepcopy(llama.model).bfloat16())
    plan, patch = mapped_plan(half, (2, 3))
    pruned, inputs = apply(half, plan, patch), {"input_ids": torch.tensor([[4, 5, 6, 7]])}
    seen = []
    handles = [pruned.layers[1].register_forward_hook(lambda _, args, out: seen.append(out)),
               pruned.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]  # fmt: skip
    logits(pruned.model, inputs)
    assert torch.equal((seen[0].float() @ patch.maps[2].T).bfloat16(), seen[1])
    for handle in handles:
        handle.remove()


def test_models_with_maps_answer_together_as_alone(vlm, samples, encode):
    inputs = encode(vlm, samples.samples[:3])
    plan, patch = mapped_plan(vlm, (2, 3))
    other = Patch(maps={2: matrix(seed=9)})
    end, start = mapped_plan(vlm, (3, 4)), mapped_plan(vlm, (0, 1))
    models = [apply(vlm, *pair) for pair in ((plan, patch), (plan, other), end, start, (plan, None))] + [vlm]
    alone = [generate(m.model, inputs) for m in models]
    found, shared = together(models, lambda model: generate(model, inputs))
    for (words, numbers), (expected_words, expected_numbers) in zip(found, alone, strict=True):
        assert torch.equal(words, expected_words)
        assert torch.equal(numbers, expected_numbers)
    assert shared.layers_saved > 0


def test_maps_are_counted(llama, samples):
    plan, patch = mapped_plan(llama, (1, 2), (3, 4))
    settings = EfficiencySettings(new_tokens=3, warmup=0, repeats=1, batch_size=2)
    measured = functools.partial(efficiency.measure_efficiency, sample=samples.samples[0], settings=settings)
    plain, found = (measured(llama, apply(llama, plan, p)) for p in (None, patch))
    more = {name: found["pruned"][name] - plain["pruned"][name] for name in ("parameters", "bytes", "prefill_flops")}
    tokens = 2 * found["sequence"]
    assert more == {"parameters": 2 * 32**2, "bytes": 8 * 32**2, "prefill_flops": 2 * 2 * tokens * 32**2}


# ------------------------------------------------------------------------------------- stored and refused


def test_maps_survive_their_file_to_the_last_bit(tmp_path):
    patch = Patch(maps={11: matrix(seed=1), 2: matrix(seed=2)})
    save_patch(patch, tmp_path / "patch.safetensors")
    again = load_patch(tmp_path / "patch.safetensors")
    assert list(again.maps) == [2, 11]
    assert all(torch.equal(again.maps[i], patch.maps[i]) for i in patch.maps)
    assert not again.updates
    assert again
    assert changed_writers(patch) == ["11.map", "2.map"]


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        ({2: matrix()}, r"has a map at layer 2, where no removed run begins \(these do: \[1\]\)"),
        ({1: matrix(31)}, r"map of the patch at layer 1 has shape \(31, 31\), but must have \(32, 32\)"),
        ({1: matrix() * float("nan")}, "map of the patch at layer 1 must consist of real, finite numbers"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, says, llama):
    with pytest.raises(SvlError, match=says):
        apply(llama, Plan(4, (1, 2)), Patch(maps=maps))


def test_a_compensation_that_gives_maps_must_say_so():
    with pytest.raises(SvlError, match=r"Linear gives maps at cuts, so its class must say foldable = False"):
        checked_patch(Linear(), Patch(maps={1: matrix()}), Plan(4, (1,)))
    with pytest.raises(SvlError, match="gives a map in place of layers from 1 on that is not finite"):
        checked_patch(Ghosted(), Patch(maps={1: matrix() / 0}), Plan(4, (1,)))


REFUSAL = r"no stock checkpoint can express; .* choose a compensation that folds into weights"


def test_exports_are_refused_before_anything_is_written(checkpoint, tmp_path):
    with pytest.raises(SvlError, match=f"the patch cannot be exported: .*{REFUSAL}"):
        export.save(checkpoint("llama"), Plan(4, (1,)), tmp_path / "out", Patch(maps={1: matrix()}))
    assert not list(tmp_path.iterdir())
