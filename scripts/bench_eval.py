"""Scoring speed of `lora eval` beside a plain padded transformers loop of batch 8, on the same rows in one run.

    python scripts/bench_eval.py                      about a minute on two cores
    python scripts/bench_eval.py --rounds 1 --tiny    a smoke test; its figures mean nothing

Rows, model and adapter are those of bench_train.py: as skewed as chat data are, in float32. The padded loop takes
rows as they come, eight at a time, padded to the longest, and reads each row's loss off all logits. The two take
turns, so that a busy machine slows both; where other programs want the cores as well, OMP_WAIT_POLICY=passive keeps
threads from spinning, which hurts many small operations most. Prints tokens per second (padding not counted), the
ratio, and how far a row's losses are apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch
from bench_train import Row, build, draw_steps, llama, padded_batch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lora_cli.data.examples import Examples
from lora_cli.engine.computation import Computation
from lora_cli.evaluate.models import CPU_TOKENS
from lora_cli.evaluate.scoring import score_rows
from lora_cli.plan import DataAccount

PADDED_ROWS = 8
STEPS_PER_ROUND = 4
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="of 64 rows each (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 32 wide")
    arguments = parser.parse_args()
    architecture = llama(arguments.tiny)
    drawn = draw_steps(STEPS_PER_ROUND * (arguments.rounds + 1), architecture.vocab_size)
    rounds = [
        [row for step in drawn[start : start + STEPS_PER_ROUND] for row in step]
        for start in range(0, STEPS_PER_ROUND * (arguments.rounds + 1), STEPS_PER_ROUND)
    ]
    padded_model, model = build(architecture).eval(), build(architecture)
    seconds, apart = np.zeros(2), 0.0
    for number, rows in enumerate(rounds):
        began = time.perf_counter()
        padded = padded_losses(padded_model, rows)
        between = time.perf_counter()
        ours = our_losses(model, rows)
        if number:  # the first round warms up
            seconds += between - began, time.perf_counter() - between
        apart = max(apart, float(np.abs(ours / padded - 1).max()))
    report([row for rows in rounds[1:] for row in rows], seconds, apart)


def padded_losses(model: PreTrainedModel, rows: Sequence[Row]) -> NDArray[np.float64]:
    """Summed loss of each row, as a tutorial finds it."""
    losses: list[float] = []
    for start in range(0, len(rows), PADDED_ROWS):
        batch = padded_batch(list(rows[start : start + PADDED_ROWS]))
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        each = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        losses += each.double().sum(dim=1).tolist()
    return np.array(losses)


def our_losses(model: PreTrainedModel, rows: Sequence[Row]) -> NDArray[np.float64]:
    """The same as `lora eval` finds it, with the tokens that are right besides."""
    computation = Computation("documents", "chunked", torch.float32, "sdpa")
    computation.prepare(model)
    return score_rows(
        model,
        computation,
        as_examples(rows),
        micro_batch_tokens=CPU_TOKENS,
        device=CPU,
        progress=lambda done, total: None,
    ).loss


def as_examples(rows: Sequence[Row]) -> Examples:
    return Examples(
        input_ids=np.concatenate([row.input_ids for row in rows]).astype(np.int32),
        trained=np.concatenate([row.trained for row in rows]),
        offsets=np.cumsum([0, *(len(row.input_ids) for row in rows)]),
        places=[str(number) for number in range(len(rows))],
        account=DataAccount(len(rows), len(rows), 0, 0, 0, 0, 0, 0),
        fingerprint="",
    )


def report(rows: Sequence[Row], seconds: NDArray[np.float64], apart: float) -> None:
    """Print what was measured."""
    tokens = sum(len(row.input_ids) for row in rows)
    supervised = sum(int(row.trained.sum()) for row in rows)
    padded, ours = seconds
    print(f"data     {len(rows)} rows, {tokens:,} tokens, {supervised / tokens:.0%} scored")
    print(f"machine  {torch.get_num_threads()} threads")
    print(f"padded   {tokens / padded:,.0f} tokens/s")
    print(f"lora     {tokens / ours:,.0f} tokens/s")
    print(f"ratio    {padded / ours:.2f}x")
    print(f"losses   at most {apart:.1e} apart in a row")


if __name__ == "__main__":
    main()
