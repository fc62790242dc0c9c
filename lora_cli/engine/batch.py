"""A micro-batch: whole examples laid end to end in one row, without padding.

Dimension names: T tokens of the row, D documents (examples), S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_cli.data.examples import Examples


@dataclass(frozen=True)
class FlatBatch:
    """One row of whole documents."""

    input_ids: Tensor
    """[1, T], int64."""
    position_ids: Tensor
    """[1, T], int64; restarts at 0 with each document."""
    document_lengths: tuple[int, ...]
    """D lengths, on the host: attention is planned without asking the device."""
    cu_seqlens: Tensor
    """[D + 1], int32: where documents begin, and T."""
    predictors: Tensor
    """[S], int64: positions whose hidden state predicts a supervised token."""
    targets: Tensor
    """[S], int64: the tokens that they must predict."""
    documents: Tensor
    """[S], int64: which document each prediction belongs to, for sums per example."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_supervised_tokens(self) -> int:
        return self.targets.shape[0]


def flat_batch(examples: Examples, indices: Sequence[int], device: torch.device) -> FlatBatch:
    """The examples `indices`, in that order, as one row on `device`."""
    parts = [examples.example(int(index)) for index in indices]
    return flatten([part.input_ids for part in parts], [part.trained for part in parts], device)


def flatten(documents_T: Sequence[np.ndarray], trained_T: Sequence[np.ndarray], device: torch.device) -> FlatBatch:
    """Token ids and masks of whole documents as one row. The first token of a document is never supervised."""
    import torch

    lengths = [len(document) for document in documents_T]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.concatenate(documents_T).astype(np.int64)
    trained = np.concatenate(trained_T).astype(bool)
    trained[starts[:-1]] = False  # nothing of its own document stands before it
    supervised = np.flatnonzero(trained)
    positions = np.concatenate([np.arange(length) for length in lengths])
    owner = np.searchsorted(starts, supervised, side="right") - 1

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    return FlatBatch(
        input_ids=to_device(input_ids[None]),
        position_ids=to_device(positions[None]),
        document_lengths=tuple(lengths),
        cu_seqlens=to_device(starts.astype(np.int32)),
        predictors=to_device(supervised - 1),
        targets=to_device(input_ids[supervised]),
        documents=to_device(owner),
    )
