"""From a config to an estimate: resolve what is `auto`, rehearse, and judge cards."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_cli.config import Config
from lora_cli.errors import ModelError, UserError
from lora_cli.estimate.cards import CARDS, Card, find_card
from lora_cli.report.estimated import CardVerdict, Estimate, Verdict
from lora_cli.report.events import Emit, Working, ignore

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lora_cli.engine.memory.need import Need, Rehearsals
    from lora_cli.engine.target import Target

USUAL_TOKENS = 4_096
"""Of a micro-batch, where neither config nor card says more."""


@dataclass(frozen=True)
class Question:
    """What is asked: a config, and a card or none."""

    config: Config
    rehearsals: Rehearsals
    card: Card | None


def estimate_vram(
    config: Config,
    *,
    gpu: str | None = None,
    vram_gib: float | None = None,
    fit: bool = False,
    compare: bool = False,
    tflops: float | None = None,
    judge_others: bool = True,
    expandable: bool | None = None,
    emit: Emit = ignore,
) -> Estimate:
    """Peak memory of the run that `config` describes, from its model's config.json alone.

    Args:
        gpu: a card to judge and to resolve every `auto` for, such as `rtx-4090`.
        vram_gib: the same by its memory.
        fit: look for the largest micro-batch on that card, and for changes that would make it fit.
        compare: LoRA, QLoRA and full fine-tuning side by side.
        tflops: 10^12 operations that the card sustains in a second, to say how long a million tokens take.
        judge_others: a verdict for every card of the catalogue.
        expandable: PyTorch's allocator under `expandable_segments`; None is what this environment asks PyTorch for.

    Raises:
        UserError: an unknown card, a model that can't be read or that can't be traced.
    """
    card = asked_card(gpu, vram_gib)
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(f"--tflops {tflops:g} is not a speed", remedy="Such as --tflops 120: what `--probe` measures.")
    if fit and card is None:
        raise UserError("--fit needs a card to fit", remedy="Add --gpu rtx-4090, or --vram 24.")
    emit(Working("reading the model's config"))
    from lora_cli.engine.memory.expandable import asked_for
    from lora_cli.engine.memory.need import Rehearsals
    from lora_cli.engine.selftest import prove_run
    from lora_cli.estimate.comparison import compare_methods
    from lora_cli.estimate.description import describe
    from lora_cli.estimate.fitting import changes_that_fit

    config, architecture = _ready(config)
    emit(Working("proving packing and loss"))
    proof = prove_run(config, architecture)
    expandable = asked_for(os.environ) if expandable is None else expandable
    question = Question(config, Rehearsals(architecture, proof, expandable=expandable), card)
    emit(Working("rehearsing two steps"))
    need, largest = _need(question)
    verdict = None if card is None else judge(need, card)
    searching = card is not None and (fit or verdict != "yes")
    if searching:
        emit(Working("looking for what would fit"))
    assert card is not None or not searching
    return describe(
        need,
        card,
        verdict,
        cards=card_verdicts(question, need, emit) if judge_others else (),
        changes=changes_that_fit(question, need) if searching and verdict != "yes" else (),
        largest=_largest(question, need, largest) if fit and verdict == "yes" else largest,
        compared=compare_methods(question, need, emit) if compare else (),
        notes=proof.notes,
        tflops=tflops,
    )


def asked_card(gpu: str | None, vram_gib: float | None) -> Card | None:
    if gpu is not None and vram_gib is not None:
        raise UserError("--gpu and --vram both given", remedy="One of them says which card.")
    if gpu is not None:
        return find_card(gpu)
    if vram_gib is not None:
        if not 0 < vram_gib < math.inf:
            raise UserError(f"--vram {vram_gib:g} is not an amount of memory")
        return Card(f"a card of {vram_gib:g} GiB", vram_gib, (8, 0), "--vram")
    return None


def target_of(card: Card | None) -> Target:
    from lora_cli.engine.target import Target

    return Target("cuda", (8, 0) if card is None else card.capability)


def judge(need: Need, card: Card) -> Verdict:
    """Fits with the margin, without it, or not at all."""
    if need.fits(card.memory_bytes):
        return "yes"
    return "too close" if need.process_bytes <= card.memory_bytes else "no"


def with_train(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def usual(config: Config) -> Config:
    """`auto` where no card is known: 4,096 tokens with checkpointing."""
    tokens, checkpointing = config.train.micro_batch_tokens, config.train.gradient_checkpointing
    return with_train(
        config,
        micro_batch_tokens=USUAL_TOKENS if tokens == "auto" else tokens,
        gradient_checkpointing=True if checkpointing == "auto" else checkpointing,
        activation_offloading=config.train.activation_offloading is True,
    )


def least(config: Config) -> Config:
    """`auto` where memory is short: one longest example at a time, with checkpointing, layers' inputs on the host."""
    from lora_cli.engine.memory.settling import frugal

    return frugal(config, config.data.max_length)


def card_verdicts(question: Question, need: Need, emit: Emit = ignore) -> tuple[CardVerdict, ...]:
    """Each card of the catalogue: with the estimate's micro-batch, or where `auto` leaves it open with the smallest."""
    verdicts = []
    for card in CARDS:
        # A card older than Ampere is judged by Ampere's trace unless it was asked about; it comes close.
        asked = question.card is not None and question.card.capability == card.capability
        target = need.target if asked else _like_ampere(card)
        found = question.rehearsals.need(usual(question.config), target)
        verdict = judge(found, card)
        if verdict != "yes":
            found = question.rehearsals.need(least(question.config), target)
            verdict = judge(found, card)
        verdicts.append(
            CardVerdict(
                card.name,
                card.memory_bytes,
                found.process_bytes_on(card.memory_bytes),
                verdict,
                found.shape.num_tokens,
            )
        )
    return tuple(verdicts)


def _like_ampere(card: Card) -> Target:
    from lora_cli.engine.target import Target

    return Target("cuda", max(card.capability, (8, 0)))


def _need(question: Question) -> tuple[Need, int | None]:
    """The need that the figures are for, and the largest micro-batch where choosing found it."""
    from lora_cli.engine.memory.choice import choose

    target = target_of(question.card)
    train = question.config.train
    open_ = "auto" in (train.micro_batch_tokens, train.gradient_checkpointing, train.activation_offloading)
    if question.card is None or not open_:
        return question.rehearsals.need(usual(question.config), target), None
    chosen = choose(question.rehearsals, question.config, target, question.card.memory_bytes)
    if chosen is None:
        return question.rehearsals.need(least(question.config), target), None
    return chosen, chosen.shape.num_tokens if train.micro_batch_tokens == "auto" else None


def _largest(question: Question, need: Need, known: int | None) -> int | None:
    from lora_cli.engine.memory.choice import largest_micro_batch

    if known is not None or question.card is None:
        return known
    found = largest_micro_batch(question.rehearsals, need.config, need.target, question.card.memory_bytes)
    return None if found is None else found.shape.num_tokens


def _ready(config: Config) -> tuple[Config, PretrainedConfig]:
    """The model's config.json, and a config that needs no weights: an adapter's settings in place of its path."""
    from lora_cli.model.architecture import build_on_meta, read_architecture
    from lora_cli.model.weights import check_prequantized, quantization_reach, refuse_partial

    architecture = read_architecture(config.model)
    came_quantized = vars(architecture).get("quantization_config")
    if came_quantized is not None:
        check_prequantized(came_quantized, config.model)
        architecture = copy.deepcopy(architecture)
        del architecture.quantization_config
    adapter = config.adapter
    if adapter is not None and adapter.path is not None:
        from lora_cli.engine.planning import settings_of

        config = config.model_copy(update={"adapter": settings_of(adapter.path, config)})
    if config.model.quantization is not None:
        base = build_on_meta(architecture, trust_remote_code=config.model.trust_remote_code)
        refuse_partial(quantization_reach(base), config.model.quantization)
    if config.model.quantization is not None and config.model.quantization.type == "int8":
        raise ModelError(
            "cannot trace int8: which values bitsandbytes treats as outliers depends on the data",
            remedy="It takes about as much as nf4 and one byte per weight more; set model.quantization: {type: nf4}.",
        )
    return config, architecture
