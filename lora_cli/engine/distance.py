"""How far results lie from those expected, in every proof at start-up."""

from __future__ import annotations

import torch
from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value; infinite if `found` is of another shape or not finite."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
