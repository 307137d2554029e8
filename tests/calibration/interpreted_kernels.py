"""What fused kernels compute. Run by test_kernels.py in a process in which Triton interprets them on the CPU."""

from __future__ import annotations

import pytest
import torch

from svl.calibration import attention, calibrate, hooks, kernels
from svl.calibration.calibrate import FIELDS
from svl.data.samples import Samples

SHAPES = {
    "one head": (1, 1, 1, 5, 16),
    "heads in groups": (2, 4, 2, 37, 16),
    "sizes that are no powers of two": (1, 2, 1, 40, 80),
    "several blocks": (1, 1, 1, 70, 24),
}


def sums_of_map(query, key, mask, causal, scaling, modality):
    """From the whole softmax map, in fp64."""
    length = query.shape[2]
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = query.double() @ key.mT * scaling
    visible = torch.ones(length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible = visible if mask is None else visible & mask
    score = score.masked_fill(~visible, -torch.inf)
    attention_map = torch.nan_to_num(score.softmax(-1)).mean(1)  # rows that see nothing
    return modality.double() @ attention_map, (attention_map @ modality.double().mT).mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_sums_are_those_of_the_whole_map(shape, causal, masked):
    torch.manual_seed(0)
    batch, heads, kv_heads, length, d = SHAPES[shape]
    query = 2 * torch.randn(batch, length, heads, d).transpose(1, 2)  # strided, as models' are
    key = 2 * torch.randn(batch, length, kv_heads, d).transpose(1, 2)
    kind = torch.randint(0, 3, (batch, 1, length))  # 2 is padding
    modality = torch.cat([kind == 0, kind == 1], 1).float()
    mask = None
    if masked:
        mask = torch.rand(batch, 1, length, length) > 0.3
        mask[0, 0, :2] = False
        mask = mask[:1]  # one for the whole batch, as models without padding have it
    given = (query, key, mask, causal, d**-0.5, modality)
    for found, expected in zip(kernels.attention_sums(*given), sums_of_map(*given), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [1, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cosines_are_those_of_the_rows(d, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, d).to(dtype), torch.randn(2, 3, 2 * d).to(dtype)[..., ::2]
    a[0, 0] = 0
    expected = torch.cosine_similarity(a.double(), b.double(), dim=-1)
    torch.testing.assert_close(kernels.row_cosines(a, b).double(), expected, atol=1e-6, rtol=1e-6)
    assert kernels.row_cosines(a, b)[0, 0] == 0


def test_calibration_by_kernels_measures_what_it_does_without(qwen, samples, monkeypatch):
    """Padded batches, grouped heads; kernels run, and what they give is what is kept."""
    few = Samples("few", samples.samples[:3])
    expected = list(calibrate.calibrate(qwen, few, batch_size=2).traces)
    called = []
    for name in ("attention_sums", "row_cosines"):
        work = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, work=work: called.append(work) or work(*args))
    for module in (attention, hooks):
        monkeypatch.setattr(module, "fused_kernels", lambda *_: kernels)
    found = list(calibrate.calibrate(qwen, few, batch_size=2).traces)
    assert len(called) == 2 * 4 * 2  # kernels, layers, batches
    for here, there in zip(found, expected, strict=True):
        for field in FIELDS:
            if getattr(there, field) is not None:
                torch.testing.assert_close(getattr(here, field), getattr(there, field), atol=1e-5, rtol=1e-5)
