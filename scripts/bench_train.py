"""Training speed of lora's engine beside a plain padded transformers loop, on the same data in one run.

    python scripts/bench_train.py                     about three minutes on two cores
    python scripts/bench_train.py --steps 2 --tiny    a smoke test; its figures mean nothing

Both train a LoRA on all linear layers of the same random Llama, 16 rows a step, in float32, on rows as skewed as chat
data are: a median of 70 tokens, a 90th percentile of 500, cut at 512. The padded loop is what a tutorial writes:
rows padded to the longest, all logits, the model's own loss, AdamW. Steps take turns, so that a busy machine slows
both. Prints tokens per second (padding not counted), the ratio, how far the losses are apart, and the share of the
machine's measured matrix-multiply peak that each reaches at 4 FLOPs per multiplied parameter and token: two forward
and two backward, as frozen weights need no gradient.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_cli.config import AdapterConfig
from lora_cli.data.packing import pack
from lora_cli.engine.assembly import causal_lm, trainable_parameters
from lora_cli.engine.batch import FlatBatch, flatten
from lora_cli.engine.computation import Computation
from lora_cli.engine.step import Learner, train_step
from lora_cli.engine.world import World, join_world
from lora_cli.model.adapter import attach_adapter

MEDIAN, NINTH_DECILE, LONGEST = 70, 500, 512
ROWS_PER_STEP = 16
LEARNING_RATE = 2e-4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One tokenized conversation; what the assistant says is trained."""

    input_ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Timing:
    """What one way of training did."""

    losses: list[float]
    seconds: list[float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="of lora (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 32 wide")
    arguments = parser.parse_args()
    architecture = llama(arguments.tiny)
    steps = draw_steps(arguments.steps, architecture.vocab_size)
    world = join_world()
    padded_step = padded_loop(build(architecture))
    lora_step = lora_loop(build(architecture), world, arguments.micro_batch_tokens)
    padded, lora = race(steps, padded_step, lora_step)
    report(architecture, steps, padded, lora)


def llama(tiny: bool) -> LlamaConfig:
    """A Llama of 8 million parameters, with grouped queries as its large relatives have."""
    return LlamaConfig(
        vocab_size=256 if tiny else 8000,
        hidden_size=32 if tiny else 256,
        intermediate_size=64 if tiny else 688,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
    )


def build(architecture: LlamaConfig) -> PreTrainedModel:
    """The same random model with the same LoRA at each call."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(copy.deepcopy(architecture)).requires_grad_(False)  # a model changes its config
    base.config.use_cache = False
    return causal_lm(attach_adapter(base, AdapterConfig(r=16), seed=1).train())


def draw_steps(count: int, vocabulary: int) -> list[list[Row]]:
    """Rows of log-normal length, of which the last two fifths are the answer; one more step than asked, to warm up."""
    draw = np.random.Generator(np.random.PCG64(0))
    spread = np.log(NINTH_DECILE / MEDIAN) / statistics.NormalDist().inv_cdf(0.9)

    def row() -> Row:
        length = int(np.clip(np.exp(draw.normal(np.log(MEDIAN), spread)), 8, LONGEST))
        return Row(draw.integers(0, vocabulary, length), np.arange(length) >= length * 3 // 5)

    return [[row() for _ in range(ROWS_PER_STEP)] for _ in range(count + 1)]


def padded_loop(model: PreTrainedModel) -> Callable[[list[Row]], float]:
    """A step as a tutorial writes it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(rows: list[Row]) -> float:
        loss: Tensor = model(**padded_batch(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def padded_batch(rows: list[Row]) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.from_numpy(row.input_ids)
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.from_numpy(np.where(row.trained, row.input_ids, -100))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def lora_loop(model: PreTrainedModel, world: World, micro_batch_tokens: int) -> Callable[[list[Row]], float]:
    """A step as `lora train` takes it."""
    computation = Computation("documents", "chunked", torch.float32, "sdpa")
    computation.prepare(model)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    learner = Learner(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        computation=computation,
        max_grad_norm=1.0,
    )

    def batch(rows: list[Row]) -> FlatBatch:
        return flatten([row.input_ids for row in rows], [row.trained for row in rows], CPU)

    def step(rows: list[Row]) -> float:
        groups = pack([len(row.input_ids) for row in rows], micro_batch_tokens)
        batches = (batch([rows[index] for index in group]) for group in groups)
        return train_step(learner, batches, sum(int(row.trained.sum()) for row in rows), world).loss

    return step


def race(steps: list[list[Row]], *ways: Callable[[list[Row]], float]) -> list[Timing]:
    """Each step by each way in turn; the first isn't timed."""
    timings = [Timing([], []) for _ in ways]
    for number, rows in enumerate(steps):
        for way, timing in zip(ways, timings, strict=True):
            began = time.perf_counter()
            timing.losses.append(way(rows))
            if number:
                timing.seconds.append(time.perf_counter() - began)
    return timings


def peak_flops(size: int = 2048) -> float:
    """The most that a float32 product of square matrices reaches, in FLOPs per second."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def report(architecture: LlamaConfig, steps: list[list[Row]], padded: Timing, lora: Timing) -> None:
    """Print what was measured, over all timed steps."""
    timed = [row for rows in steps[1:] for row in rows]
    tokens = sum(len(row.input_ids) for row in timed)
    supervised = sum(int(row.trained.sum()) for row in timed)
    model = LlamaForCausalLM(architecture)
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    flops = 4 * (layers * tokens + head * supervised)  # the least that must be multiplied; a look-up isn't
    peak = peak_flops() if architecture.hidden_size > 32 else peak_flops(64)
    lengths = [len(row.input_ids) for row in timed]
    apart = max(abs(a - b) / a for a, b in zip(padded.losses, lora.losses, strict=True))
    slow, fast = sum(padded.seconds), sum(lora.seconds)
    print(f"model    Llama, {model.num_parameters():,} parameters; LoRA r 16 on all linear layers; float32")
    print(
        f"data     {len(timed)} rows of {min(lengths)} to {max(lengths)} tokens, "
        f"median {statistics.median(lengths):.0f}; {tokens:,} tokens, {supervised / tokens:.0%} trained"
    )
    print(f"machine  {torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s at its best in float32")
    print(f"padded   {tokens / slow:,.0f} tokens/s, {flops / slow / peak:.0%} of the peak")
    print(f"lora     {tokens / fast:,.0f} tokens/s, {flops / fast / peak:.0%} of the peak")
    print(f"ratio    {slow / fast:.2f}x")
    print(f"losses   at most {apart:.1e} apart, over {len(steps)} steps")


if __name__ == "__main__":
    main()
