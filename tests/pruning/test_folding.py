"""Patches: the arithmetic of folding, what of a patch must fit the model, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from svl.core import JoinedPart, Patch, Plan, SvlError, Update
from svl.pruning import folding
from svl.pruning.patch_file import load_patch, save_patch
from svl.pruning.surgery import apply

CHANCE = torch.Generator().manual_seed(1)


def chance(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=CHANCE) / 6


UPDATE = Update(chance(32, 2), chance(2, 32))
PLAN = Plan(4, (1,))


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("experts", [False, True])
def test_folding_is_the_formula_in_double_precision(dtype, flipped, experts):
    """W + left right W + delta, however the matrix is stored; more columns than are changed at a time."""
    d, n_in = 32, folding.BLOCK_COLUMNS + 7
    shape = (3, n_in, d) if experts else (n_in, d)
    weight = chance(*shape).to(dtype) if flipped else chance(*shape).to(dtype).mT.contiguous()
    update = UPDATE if experts else replace(UPDATE, delta=chance(d, n_in))
    exact = weight.double().mT if flipped else weight.double()
    exact = exact + UPDATE.left.double() @ UPDATE.right.double() @ exact + (0 if experts else update.delta.double())
    folded = folding.fold_update(weight, update, flipped)
    assert folded.dtype == dtype
    assert folded.shape == weight.shape
    torch.testing.assert_close(
        folded.mT if flipped else folded, exact.to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps
    )


def test_biases_are_multiplied_and_shifted():
    bias, shift = chance(32), chance(32)
    expected = bias + UPDATE.left @ (UPDATE.right @ bias) + shift
    torch.testing.assert_close(folding.fold_update(bias, replace(UPDATE, shift=shift)), expected)


@pytest.mark.parametrize("part", ["left", "right"])
def test_the_factor_that_is_missing_is_the_identity(part):
    weight, factor = chance(32, 48), chance(32, 32)
    torch.testing.assert_close(folding.fold_update(weight, Update(**{part: factor})), weight + factor @ weight)


def test_a_patch_computes_in_fp32_and_keeps_the_dtype():
    weight = chance(32, 48).bfloat16()
    exact = weight.double() + UPDATE.left.double() @ (UPDATE.right.double() @ weight.double())
    assert torch.equal(folding.fold_update(weight, UPDATE), exact.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_weight_stands_in_and_is_changed_as_the_one_it_replaces(dtype, flipped):
    old, new = chance(32, 300).to(dtype), chance(32, 300).to(dtype)
    stored = old.mT.contiguous() if flipped else old
    for update in (Update(), UPDATE, Update(delta=chance(32, 300), scale=0.5)):
        changed = folding.fold_update(stored, replace(update, weight=new), flipped)
        assert torch.equal(changed.mT if flipped else changed, folding.fold_update(new, update))
    bias = chance(32)
    assert torch.equal(folding.fold_update(bias, Update(weight=new)), bias)


# ------------------------------------------------------------------------------------------- what does not fit

NAN, INF = float("nan"), float("inf")
WRONG = {
    "left is NaN": (Update(torch.full((32, 32), NAN)), "'left' of the patch .* must consist of real, finite numbers"),
    "one Inf": (Update(UPDATE.left, UPDATE.right.clone().index_fill_(0, torch.tensor(1), INF)), "'right' .* finite"),
    "complex": (Update(UPDATE.left.to(torch.complex64), UPDATE.right), "'left' .* real, finite numbers"),
    "integers": (Update(torch.ones(32, 32, dtype=torch.int64)), "'left' .* real, finite numbers"),
    "a scalar": (Update(torch.tensor(0.5)), r"'left' .* has shape \(\), but must have \(32, 32\)"),
    "left broadcasts": (Update(chance(1, 32)), r"'left' .* shape \(1, 32\), but must have \(32, 32\)"),
    "left of another width": (Update(chance(16, 2), chance(2, 32)), r"shape \(16, 2\), but must have \(32, 2\)"),
    "ranks differ": (Update(chance(32, 3), chance(2, 32)), r"'right' .* \(2, 32\), but must have \(3, 32\)"),
    "right alone is low": (Update(right=chance(2, 32)), r"'right' .* \(2, 32\), but must have \(32, 32\)"),
    "delta broadcasts": (Update(delta=chance(1, 48)), r"'delta' .* \(1, 48\), but must have \(32, 48\)"),
    "delta is turned": (Update(delta=chance(48, 32)), r"'delta' .* \(48, 32\), but must have \(32, 48\)"),
    "delta of experts": (Update(delta=chance(1, 32, 48)), r"'delta' .* \(1, 32, 48\), but must have \(32, 48\)"),
    "shift broadcasts": (Update(shift=chance(1)), r"'shift' .* \(1,\), but must have \(32,\)"),
    "shift is NaN": (Update(shift=torch.full((32,), NAN)), "'shift' of the patch for 'mlp' of layer 2 must consist"),
}  # fmt: skip


@pytest.mark.parametrize(("update", "message"), WRONG.values(), ids=WRONG)
def test_updates_that_do_not_fit_are_one_line(update, message, llama):
    before = {name: p.clone() for name, p in llama.model.named_parameters()}
    with pytest.raises(SvlError, match=message) as error:
        apply(llama, PLAN, Patch({(2, "mlp"): update}))
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in llama.model.named_parameters())


@pytest.mark.parametrize(
    ("blends", "message"),
    [
        ({1: {0: 1.0}}, "blends layer 1, which the pruned model does not have"),
        ({7: {0: 1.0}}, "blends layer 7, which the pruned model does not have"),
        ({0: {}}, r"blends layer 0 of layers \[\]"),
        ({0: {0: 1.0, 4: 1.0}}, r"blends layer 0 of layers \[0, 4\]: not of 0\.\.3"),
        ({0: {-1: 1.0}}, r"blends layer 0 of layers \[-1\]"),
        ({0: {0: NAN}}, "coefficients that are not finite"),
        ({0: {0: 1.0, 1: INF}}, "coefficients that are not finite"),
        ({0: {0: "1"}}, "coefficients that are not finite"),
    ],
    ids=str,
)
def test_blends_that_do_not_fit_are_one_line(blends, message, llama):
    with pytest.raises(SvlError, match=message):
        apply(llama, PLAN, Patch(blends=blends))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_updates_of_any_shape_fit_exactly_or_are_refused(data, llama):
    """What passes the check is folded into a weight of the same shape and of finite numbers."""
    shapes = st.lists(st.sampled_from([1, 2, 31, 32, 48]), max_size=3).map(tuple)
    parts = {}
    for part in ("left", "right", "delta", "shift", "weight"):
        if data.draw(st.booleans()):
            fill = data.draw(st.sampled_from([0.0, 0.5, NAN, INF, 1]))
            dtype = torch.int32 if isinstance(fill, int) else torch.float32
            parts[part] = torch.full(data.draw(shapes), fill, dtype=dtype)
    update, anatomy = Update(**parts), llama.anatomy
    try:
        folding.check_patch_for_model(Patch({(0, "mlp"): update}), PLAN, anatomy, llama.layers)
    except SvlError:
        return
    weight = llama.layers[0].mlp.down_proj.weight
    folded = folding.fold_update(weight, update)
    assert folded.shape == weight.shape
    assert bool(folded.isfinite().all())


# ------------------------------------------------------------------------------------------------------- files


def test_a_patch_has_one_file(tmp_path):
    """Scores go by its hash."""
    part = JoinedPart(0, 0.3, 0.7, *(torch.arange(k) for k in (3, 2, 1)))
    patch = Patch({(0, "mlp"): Update(scale=2.0)}, {1: {0: 0.5, 2: 0.5}}, {3: torch.eye(2)}, joins={2: (part, part)})
    for n in range(8):
        save_patch(patch, tmp_path / str(n))
    assert len({(tmp_path / str(n)).read_bytes() for n in range(8)}) == 1
    (first, second) = load_patch(tmp_path / "0").joins[2]
    assert (first.layer, first.norm, first.share) == (0, 0.3, 0.7)
    assert torch.equal(second.queries, part.queries)


def test_patches_survive_their_file(tmp_path):
    updates = {(11, "mlp"): UPDATE, (2, "attn"): Update(delta=chance(32, 48), shift=chance(32), weight=chance(32, 48))}
    save_patch(Patch(updates, {3: {3: 0.5, 4: 0.5}}), tmp_path / "patch.safetensors")
    again = load_patch(tmp_path / "patch.safetensors")
    assert again.blends == {3: {3: 0.5, 4: 0.5}}
    assert list(again.updates) == sorted(updates)
    for key, update in updates.items():
        for part in ("left", "right", "delta", "shift", "weight"):
            before, after = getattr(update, part), getattr(again.updates[key], part)
            assert after is None if before is None else torch.equal(after, before)


STRANGE = (
    "left", "1.left", "1.mlp.middle", "x.mlp.left", "-1.mlp.left", "1.5.mlp.left", "\uff11.mlp.left",
    "1.mlp.left.weight", ".mlp.left", "9999999999999999999999.mlp.left",
)  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_parts_are_named(name, tmp_path):
    save_file({name: torch.zeros(2)}, tmp_path / "patch.safetensors")
    with pytest.raises(SvlError, match=r"is not a patch: '.*' is not named <layer>\.<writer>\.<part"):
        load_patch(tmp_path / "patch.safetensors")


NO_BLENDS = ("{", "[1]", "[" * 100_000, '{"a": {"0": 1}}', '{"0": [1]}', '{"0": {"0": "x"}}', "null")


@pytest.mark.parametrize("blends", NO_BLENDS, ids=lambda text: text[:20])
def test_blends_of_a_file_are_numbers(blends, tmp_path):
    save_file({"1.mlp.left": torch.zeros(2, 2)}, tmp_path / "patch.safetensors", {"blends": blends})
    with pytest.raises(SvlError, match=r"patch.safetensors' is not a patch: [^\n]+$"):
        load_patch(tmp_path / "patch.safetensors")


def flips(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut, or with a byte changed."""
    cut = st.integers(0, len(content) - 1).map(lambda n: content[:n])
    changed = st.tuples(st.integers(0, min(200, len(content) - 1)), st.integers(1, 255))
    return cut | changed.map(lambda at: content[: at[0]] + bytes([content[at[0]] ^ at[1]]) + content[at[0] + 1 :])


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_files_are_one_line_or_a_patch(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("patch") / "patch.safetensors"
    save_patch(Patch({(1, "mlp"): Update(chance(4, 1), chance(1, 4))}, {0: {0: 0.5}}), file)
    Path(file).write_bytes(data.draw(flips(file.read_bytes())))
    try:
        patch = load_patch(file)
    except SvlError as error:
        message = str(error)
    else:
        assert isinstance(patch, Patch)
        return
    assert "is not a patch: " in message
    assert "\n" not in message


def test_a_file_says_what_it_holds(tmp_path):
    """The layout is documented: others write patches, too."""
    save_patch(Patch({(1, "mlp"): UPDATE}, {0: {0: 0.5, 2: 0.5}}), tmp_path / "patch.safetensors")
    with safe_open(tmp_path / "patch.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["1.mlp.left", "1.mlp.right"]
        assert json.loads(file.metadata()["blends"]) == {"0": {"0": 0.5, "2": 0.5}}


def test_factors_are_converted_once_for_all_blocks():
    """Each is as large as a weight: moving it to a device again for every block of columns would take longest."""
    converted = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].dtype is torch.float64:
                converted.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    update = Update(torch.rand(8, 3, dtype=torch.float64), torch.rand(3, 8, dtype=torch.float64))
    with Watch():
        folding.fold_update(torch.rand(8, 1000), update)
    assert sorted(converted) == [(3, 8), (8, 3)]
