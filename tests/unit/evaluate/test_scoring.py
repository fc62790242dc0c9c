"""Row by row, the loss and the right tokens are those of a plain transformers loop, whatever the packing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_cli.engine.computation import Computation
from lora_cli.evaluate.scoring import score_rows
from tests.unit.engine.learning import examples, with_adapter
from tests.unit.engine.tiny import tiny_model

TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite")
LENGTHS = (23, 2, 41, 5, 17, 9, 30, 64)
WAYS = {
    "documents": Computation("documents", "chunked", torch.float32, "sdpa"),
    "single": Computation("single", "chunked", torch.float32, "eager"),
    "full loss": Computation("documents", "full", torch.float32, "sdpa"),
}
CPU = torch.device("cpu")


def one_by_one(model, rows):
    """Each row alone, all logits, the way that everybody writes it."""
    losses, right = [], []
    for index in range(len(rows)):
        row = rows.example(index)
        ids = torch.tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        trained = torch.tensor(row.trained)[1:]
        losses.append(float(cross_entropy(logits[trained], ids[0, 1:][trained], reduction="sum")))
        right.append(int((logits[trained].argmax(-1) == ids[0, 1:][trained]).sum()))
    return losses, right


@pytest.mark.parametrize("model_type", TYPES)
def test_a_rows_score_is_that_of_the_row_alone(model_type):
    rows = examples(LENGTHS)
    model = with_adapter(tiny_model(model_type)).eval()
    with torch.no_grad():  # B is zero at first, which would leave the adapter out of it
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    losses, right = one_by_one(model, rows)
    assert max(losses) > 1
    for way, computation in WAYS.items():
        computation.prepare(model)
        for tokens in (1, 31, 64, 4096):
            scores = score_rows(
                model, computation, rows, micro_batch_tokens=tokens, device=CPU, progress=lambda done, total: None
            )
            assert scores.loss.tolist() == pytest.approx(losses, rel=1e-6), (way, tokens)
            assert scores.correct.tolist() == right, (way, tokens)
