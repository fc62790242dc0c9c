"""The two low-rank factors that come nearest to a matrix, and how near that is.

The truncated singular value decomposition: no other product of that rank comes closer (Eckart and Young, 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = 1024
"""The smaller side of a matrix up to which all singular values are computed. Above, the largest ones are found by
random projection with power iterations (Halko, Martinsson and Tropp, 2011); the error that is told is measured."""
_SPARE, _ITERATIONS = 16, 6


def nearest_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [r, in] and B [out, r] in float32 with B @ A near `matrix` [out, in], and the relative error (Frobenius)."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + _SPARE, *matrix.shape), niter=_ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    error = torch.linalg.norm(matrix - b @ a) / torch.linalg.norm(matrix)
    return a.contiguous(), b.contiguous(), float(error)
