"""Fused kernels for CUDA devices: what calibration measures, without writing what it is made of.

Written in Triton, which comes with PyTorch's CUDA builds. Tensors elsewhere go other ways, to the same values but for
the order of sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of `a` [..., d] with that of `b`, sums in fp32: [...], 0 where a row is zero."""
    a, b = a.contiguous(), b.contiguous()
    result = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    d = a.shape[-1]
    with torch.cuda.device_of(a):
        _row_cosines[(result.numel(),)](a, b, result, d, block=min(triton.next_power_of_2(d), 4096))
    return result


def attention_sums(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scaling: float, modality: Tensor
) -> tuple[Tensor, Tensor]:
    """What tokens of each modality pay every key, and what every query pays keys of each, averaged over heads.

    Scores are kept in fp32, and the softmax map is made twice, block by block, and never written. A query that sees
    nothing (padding) pays nothing.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, T, D].
        mask: bool [B, 1, T, T], True where a query may look; None for all.
        causal: no query looks at a later key.
        scaling: of scores.
        modality: [B, 2, T], 1 where a token is of that modality.

    Returns:
        received and emitted, fp32 [B, 2, T].
    """
    b, h, t, d = query.shape
    modality = modality.float().contiguous()
    emitted, received = (torch.empty(b, h, 2, t, dtype=torch.float32, device=query.device) for _ in range(2))
    normaliser = torch.empty(b, h, t, dtype=torch.float32, device=query.device)
    seen = mask.view(torch.uint8).expand(b, 1, t, t) if mask is not None else query
    mask_strides = (seen.stride(0), seen.stride(2), seen.stride(3)) if mask is not None else (0, 0, 0)
    given = (query, key, seen, modality, normaliser)
    strides = (*query.stride(), *key.stride(), *mask_strides)
    sizes = (h // key.shape[1], t, d, scaling)
    options: dict[str, Any] = block_sizes(d, query.element_size())
    options |= {"masked": mask is not None, "causal": causal}
    grid = (triton.cdiv(t, options["rows"]), h, b)
    with torch.cuda.device_of(query):
        emitted_by_head[grid](*given, emitted, *strides, *sizes, **options)
        received_by_head[grid](*given, received, *strides, *sizes, **options)
    return received.mean(1), emitted.mean(1)


def block_sizes(d: int, itemsize: int) -> dict[str, int]:
    """Tokens and numbers of a block: together they take at most 99 KB, which multiprocessors have since Ampere."""
    width = max(16, triton.next_power_of_2(d))
    size = width * itemsize
    rows = 64 if size <= 256 else 32 if size <= 1024 else 16
    return {"width": width, "rows": rows, "num_warps": 4, "num_stages": 2}


@triton.jit
def _row_cosines(a_at, b_at, out_at, d, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, block)
    aa = tl.zeros((block,), tl.float32)
    bb = tl.zeros((block,), tl.float32)
    ab = tl.zeros((block,), tl.float32)
    for start in range(0, d, block):
        here = start + places
        a = tl.load(a_at + row * d + here, here < d, 0.0).to(tl.float32)
        b = tl.load(b_at + row * d + here, here < d, 0.0).to(tl.float32)
        aa += a * a
        bb += b * b
        ab += a * b
    size = tl.sqrt(tl.sum(aa)) * tl.sqrt(tl.sum(bb))
    tl.store(out_at + row, tl.sum(ab) / tl.maximum(size, 1.1754943508222875e-38))


@triton.jit
def _load_rows(start_at, stride_t, stride_d, at, t, d, width: tl.constexpr):
    """Vectors [rows, width] of the tokens `at`, 0 beyond the last."""
    column = tl.arange(0, width)
    inside = (at[:, None] < t) & (column[None, :] < d)
    return tl.load(start_at + at[:, None] * stride_t + column[None, :] * stride_d, inside, 0.0)


@triton.jit
def _scores(q, k, i, j, t, scaling, mask_at, mask_i, mask_j, masked: tl.constexpr, causal: tl.constexpr):
    """Scores of queries `i` and keys `j`, -inf where a query does not look and beyond the last token."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    visible = (i[:, None] < t) & (j[None, :] < t)
    if causal:
        visible = visible & (j[None, :] <= i[:, None])
    if masked:
        visible = tl.load(mask_at + i[:, None] * mask_i + j[None, :] * mask_j, visible, 0) != 0
    return tl.where(visible, score, float("-inf"))


@triton.jit
def emitted_by_head(
    q_at,
    k_at,
    mask_at,
    modality_at,
    normaliser_at,
    out_at,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    mask_b,
    mask_i,
    mask_j,
    group,
    t,
    d,
    scaling,
    width: tl.constexpr,
    rows: tl.constexpr,
    masked: tl.constexpr,
    causal: tl.constexpr,
):
    """A block of queries of one head: log of the sum of exp(score), and what they pay to each modality."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * rows
    i = first + tl.arange(0, rows)
    q = _load_rows(q_at + b * q_b + h * q_h, q_t, q_d, i, t, d, width)
    top = tl.full((rows,), float("-inf"), tl.float32)
    whole = tl.zeros((rows,), tl.float32)
    visual = tl.zeros((rows,), tl.float32)
    textual = tl.zeros((rows,), tl.float32)
    stop = t
    if causal:
        stop = tl.minimum(t, first + rows)
    for start in range(0, stop, rows):
        j = start + tl.arange(0, rows)
        k = _load_rows(k_at + b * k_b + (h // group) * k_h, k_t, k_d, j, t, d, width)
        score = _scores(q, k, i, j, t, scaling, mask_at + b * mask_b, mask_i, mask_j, masked, causal)
        higher = tl.maximum(top, tl.max(score, 1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        shrink = tl.exp(top - reference)
        p = tl.exp(score - reference[:, None])
        is_visual = tl.load(modality_at + 2 * b * t + j, j < t, 0.0)
        is_textual = tl.load(modality_at + (2 * b + 1) * t + j, j < t, 0.0)
        whole = whole * shrink + tl.sum(p, 1)
        visual = visual * shrink + tl.sum(p * is_visual[None, :], 1)
        textual = textual * shrink + tl.sum(p * is_textual[None, :], 1)
        top = higher
    row = b * tl.num_programs(1) + h
    nothing = whole == 0.0
    tl.store(normaliser_at + row * t + i, tl.where(nothing, 0.0, top + tl.log(whole)), i < t)
    whole = tl.where(nothing, 1.0, whole)
    tl.store(out_at + 2 * row * t + i, visual / whole, i < t)
    tl.store(out_at + (2 * row + 1) * t + i, textual / whole, i < t)


@triton.jit
def received_by_head(
    q_at,
    k_at,
    mask_at,
    modality_at,
    normaliser_at,
    out_at,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    mask_b,
    mask_i,
    mask_j,
    group,
    t,
    d,
    scaling,
    width: tl.constexpr,
    rows: tl.constexpr,
    masked: tl.constexpr,
    causal: tl.constexpr,
):
    """A block of keys of one head: what they get from each modality."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = b * tl.num_programs(1) + h
    first = tl.program_id(0) * rows
    j = first + tl.arange(0, rows)
    k = _load_rows(k_at + b * k_b + (h // group) * k_h, k_t, k_d, j, t, d, width)
    visual = tl.zeros((rows,), tl.float32)
    textual = tl.zeros((rows,), tl.float32)
    begin = 0
    if causal:
        begin = first
    for start in range(begin, t, rows):
        i = start + tl.arange(0, rows)
        q = _load_rows(q_at + b * q_b + h * q_h, q_t, q_d, i, t, d, width)
        score = _scores(q, k, i, j, t, scaling, mask_at + b * mask_b, mask_i, mask_j, masked, causal)
        p = tl.exp(score - tl.load(normaliser_at + row * t + i, i < t, 0.0)[:, None])
        from_visual = tl.load(modality_at + 2 * b * t + i, i < t, 0.0)
        from_textual = tl.load(modality_at + (2 * b + 1) * t + i, i < t, 0.0)
        visual += tl.sum(p * from_visual[:, None], 0)
        textual += tl.sum(p * from_textual[:, None], 0)
    tl.store(out_at + 2 * row * t + j, visual, j < t)
    tl.store(out_at + (2 * row + 1) * t + j, textual, j < t)
