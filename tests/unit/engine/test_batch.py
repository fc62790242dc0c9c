"""Whole documents laid end to end."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.engine.batch import flatten

CPU = torch.device("cpu")


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_nothing_is_supervised_across_a_boundary(masks: list[list[bool]]) -> None:
    """Also where a mask says so: a document's first token would be predicted from the one before it."""
    count = iter(range(1, 1000))
    documents = [np.array([next(count) for _ in mask]) for mask in masks]  # every token of the row is another
    batch = flatten(documents, [np.array(mask) for mask in masks], CPU)
    expected = [
        (int(document[i - 1]), int(document[i]), number)
        for number, (document, mask) in enumerate(zip(documents, masks, strict=True))
        for i in range(1, len(mask))
        if mask[i]
    ]
    predictors = batch.input_ids[0, batch.predictors].tolist()
    assert list(zip(predictors, batch.targets.tolist(), batch.documents.tolist(), strict=True)) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_positions_restart_with_each_document(lengths: list[int]) -> None:
    batch = flatten([np.arange(n) + 5 for n in lengths], [np.ones(n, dtype=bool) for n in lengths], CPU)
    assert batch.position_ids[0].tolist() == [i for n in lengths for i in range(n)]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert batch.document_lengths == tuple(lengths)
    assert batch.num_tokens == sum(lengths)
