"""Hadamard matrices: square, of entries 1 and -1, with orthogonal rows.

By Sylvester's doubling of one of Paley's, which exist of order p + 1 for primes p = 3 (mod 4) and of order 2 (p + 1)
for primes p = 1 (mod 4). That covers the widths of most models: powers of two, 576, 896, 960, 1536, 3584, 5120, 6656.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svl.core import SvlError


def orthonormal_hadamard(order: int) -> Tensor:
    """H / sqrt(order), fp64, H being a Hadamard matrix.

    Raises:
        SvlError: if none of this order is known here.
    """
    base = order // (order & -order)  # the odd part: as small as doubling may start from
    while base <= order:
        if (found := _base(base)) is not None:
            while len(found) < order:
                found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
            return found / order**0.5
        base *= 2
    raise SvlError(f"no Hadamard matrix of order {order} is known here; set compensation.rotate=false")


def _base(order: int) -> Tensor | None:
    """A Hadamard matrix that is not doubled from a smaller one, if one of Paley's has this order."""
    one = torch.ones(1, 1, dtype=torch.float64)
    if order == 1:
        return one
    if order % 4:
        return None
    if _is_prime(order - 1):  # 3 (mod 4), since order is 0: I + S with S skew
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -one)
    half = order // 2
    if _is_prime(half - 1) and half % 4 == 2:
        # Every entry of a symmetric conference matrix becomes a block of two by two.
        on_diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        elsewhere = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        conference = _bordered(half - 1, one)
        return torch.kron(torch.eye(half, dtype=torch.float64), on_diagonal) + torch.kron(conference, elsewhere)
    return None


def _bordered(p: int, sign: Tensor) -> Tensor:
    """[p + 1, p + 1]: 0 in the corner, 1 beside it, `sign` below it; elsewhere 1 or -1: is i - j a square mod p?"""
    squares = {i * i % p for i in range(1, p)}
    character = torch.tensor([0.0 if d == 0 else 1.0 if d in squares else -1.0 for d in range(p)], dtype=torch.float64)
    places = torch.arange(p)
    core = character[(places[:, None] - places) % p]
    top = torch.cat([torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, p, dtype=torch.float64)], 1)
    return torch.cat([top, torch.cat([sign.expand(p, 1), core], 1)])


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
