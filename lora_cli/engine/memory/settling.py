"""What the memory `auto`s of a run come to on the card at hand, before its weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_cli.config import Config
from lora_cli.engine.memory.choice import choose
from lora_cli.engine.memory.expandable import asked_for
from lora_cli.engine.memory.need import MARGIN, Need, Rehearsals
from lora_cli.engine.selftest import Proof
from lora_cli.engine.target import Target
from lora_cli.errors import LoraError
from lora_cli.plan import Memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNASKED_TOKENS = 8_192
"""Where the estimator has no answer: out of memory halves it, so that too much costs a step and not the run."""


@dataclass(frozen=True)
class Settled:
    """A config without memory `auto`s, and what it is estimated to need."""

    config: Config
    memory: Memory | None
    warning: str | None = None
    rehearsals: Rehearsals | None = None
    """What was rehearsed for that, of which a run beside it may make use."""


def settle_memory(
    config: Config,
    architecture: PretrainedConfig,
    proof: Proof,
    target: Target,
    card_bytes: int,
    rehearsals: Rehearsals | None = None,
) -> Settled:
    """Resolve the memory `auto`s of a config for a card; what is given stays as it is.

    Args:
        card_bytes: of the card, minus what other processes hold.
        rehearsals: of another run on the same base, proven to go the same way.
    """
    try:
        rehearsals = rehearsals or Rehearsals(architecture, proof, expandable=asked_for(os.environ))
        found = choose(rehearsals, config, target, card_bytes)
        if found is not None:
            return Settled(found.config, _memory(found, card_bytes), rehearsals=rehearsals)
        least = rehearsals.need(frugal(config, config.data.max_length), target)
    except (LoraError, RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        # Whatever an architecture's own code does on a device without data; the run itself has real ones.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        unasked = frugal(config, UNASKED_TOKENS, offloading=False)
        return Settled(unasked, None, f"memory could not be estimated: {first}")
    warning = (
        f"by the estimate it does not fit: {least.process_bytes / 2**30:.1f} of {card_bytes / 2**30:.1f} GiB at "
        f"{least.config.train.micro_batch_tokens:,} tokens a micro-batch, and {MARGIN:.0%} are kept free"
    )
    return Settled(least.config, _memory(least, card_bytes), warning, rehearsals)


def frugal(config: Config, tokens: int, *, offloading: bool = True) -> Config:
    """The most frugal of what the config leaves open.

    Args:
        tokens: of a micro-batch.
        offloading: layers' inputs may go to the host.
    """
    train = config.train
    checkpointing = train.gradient_checkpointing in ("auto", True)
    away = checkpointing and offloading if train.activation_offloading == "auto" else train.activation_offloading
    settled = {
        "micro_batch_tokens": tokens if train.micro_batch_tokens == "auto" else train.micro_batch_tokens,
        "gradient_checkpointing": checkpointing,
        "activation_offloading": away,
    }
    return config.model_copy(update={"train": train.model_copy(update=settled)})


def _memory(need: Need, card_bytes: int) -> Memory:
    return Memory(
        process_bytes=need.process_bytes_on(card_bytes),
        allocated_bytes=need.replayed.peak_allocated_bytes,
        device_bytes=card_bytes,
    )
