"""What `micro_batch_tokens`, `gradient_checkpointing` and `activation_offloading` come to on a card of some size, where
they are `auto`.

Without checkpointing a step takes about a quarter less time, so it is left out where a useful micro-batch fits without
it; layers' inputs go to the host where not even one longest example fits otherwise. Memory grows nearly linearly with
the tokens of a micro-batch once the loss fills its chunks, and more steeply below: two rehearsals give a slope, a third
proves the result and gives the next slope.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_cli.config import Config
from lora_cli.engine.memory.need import MARGIN, Need, Rehearsals
from lora_cli.engine.target import Target

USEFUL_TOKENS = 4_096
"""A micro-batch from which on a card is busy."""
MOST_TOKENS = 32_768
"""Beyond it nothing is gained."""
STEP_TOKENS = 1_024
GAIN = 1.1
"""A micro-batch that is larger by less isn't looked for."""


def choose(rehearsals: Rehearsals, config: Config, target: Target, card_bytes: int) -> Need | None:
    """The need of `config` with its memory `auto`s resolved for a card; None when nothing fits.

    Args:
        card_bytes: of the card, minus what other processes hold.
    """
    asked = config.train.gradient_checkpointing
    tokens = config.train.micro_batch_tokens
    for checkpointing, offloading in _frugalities(config):
        candidate = _with(config, gradient_checkpointing=checkpointing, activation_offloading=offloading)
        if isinstance(tokens, int):
            found = rehearsals.need(candidate, target)
            found_fits = found.fits(card_bytes)
        else:
            least = min(USEFUL_TOKENS, most_tokens(config)) if asked == "auto" and not checkpointing else 0
            largest = largest_micro_batch(rehearsals, candidate, target, card_bytes, least=least)
            if largest is None:
                continue
            found, found_fits = largest, True
        if found_fits:
            return found
    return None


def _frugalities(config: Config) -> Iterator[tuple[bool, bool]]:
    """Checkpointing and offloading as the config leaves them open, what costs the least time first."""
    train = config.train
    for checkpointing, offloading in ((False, False), (True, False), (True, True)):
        if train.gradient_checkpointing in ("auto", checkpointing) and train.activation_offloading in (
            "auto",
            offloading,
        ):
            yield checkpointing, offloading


def largest_micro_batch(
    rehearsals: Rehearsals, config: Config, target: Target, card_bytes: int, *, least: int = 0
) -> Need | None:
    """The need with the largest micro-batch that fits, at least `least` tokens; None when none does."""
    smallest = min(max(least, config.data.max_length), most_tokens(config))
    small = rehearsals.need(_with(config, micro_batch_tokens=smallest), target)
    if not small.fits(card_bytes):
        return None
    top = most_tokens(config)
    if top <= smallest:
        return small
    double = rehearsals.need(_with(config, micro_batch_tokens=min(2 * smallest, top)), target)
    if not double.fits(card_bytes):
        return _between(rehearsals, config, target, card_bytes, small, double)
    low, high = small, double
    while high.shape.num_tokens < top:
        larger = _beyond(rehearsals, config, target, card_bytes, low, high)
        if larger is None:
            break
        low, high = high, larger
    return high


def _beyond(
    rehearsals: Rehearsals, config: Config, target: Target, card_bytes: int, low: Need, high: Need
) -> Need | None:
    """A larger micro-batch that fits, as two that fit let expect it; None where at most a tenth is to be gained."""
    known = high.shape.num_tokens
    slope = (high.process_bytes - low.process_bytes) / (known - low.shape.num_tokens)
    room = card_bytes / (1 + MARGIN) - high.process_bytes
    top = most_tokens(config)
    tokens = min(top, known + int(room / max(slope, 1)))
    while _rounded(tokens, top) > GAIN * known:
        found = rehearsals.need(_with(config, micro_batch_tokens=_rounded(tokens, top)), target)
        if found.fits(card_bytes):
            return found
        tokens = int(0.9 * tokens)
    return None


def most_tokens(config: Config) -> int:
    """No micro-batch is larger than a step of the longest examples, and none needs to be larger than this."""
    longest = config.data.max_length
    return max(longest, min(MOST_TOKENS, longest * config.train.batch_size))


def _between(rehearsals: Rehearsals, config: Config, target: Target, card_bytes: int, small: Need, large: Need) -> Need:
    """Between a size that fits and one that doesn't, by what they need."""
    share = (card_bytes / (1 + MARGIN) - small.process_bytes) / max(1, large.process_bytes - small.process_bytes)
    tokens = small.shape.num_tokens + int(
        min(0.95, max(0.0, share)) * (large.shape.num_tokens - small.shape.num_tokens)
    )
    tokens -= tokens % STEP_TOKENS
    if tokens <= small.shape.num_tokens:
        return small
    found = rehearsals.need(_with(config, micro_batch_tokens=tokens), target)
    return found if found.fits(card_bytes) else small


def _rounded(tokens: int, top: int) -> int:
    return tokens if tokens >= top else max(STEP_TOKENS, tokens - tokens % STEP_TOKENS)


def _with(config: Config, **train: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
