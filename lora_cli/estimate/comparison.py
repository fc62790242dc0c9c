"""Full fine-tuning, LoRA and QLoRA of the same model, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_cli.config import Config
from lora_cli.config.schema import AdapterConfig, QuantizationConfig
from lora_cli.report.estimated import Compared
from lora_cli.report.events import Emit, Working

if TYPE_CHECKING:
    from lora_cli.engine.memory.need import Need
    from lora_cli.estimate.estimation import Question


def compare_methods(question: Question, need: Need, emit: Emit) -> tuple[Compared, ...]:
    """The same micro-batch by three methods."""
    from lora_cli.estimate.cards import CARDS

    found = []
    for name, config in _methods(need.config).items():
        emit(Working(f"rehearsing {name}"))
        other = question.rehearsals.need(config, need.target)
        parts = other.replayed.components
        trainable = (parts.get("adapters", 0) + parts.get("trained weights", 0)) // 4  # float32
        smallest = next((card.name for card in CARDS if other.fits(card.memory_bytes)), None)
        found.append(Compared(name, other.process_bytes, trainable, smallest))
    return tuple(found)


def _methods(config: Config) -> dict[str, Config]:
    adapter = config.adapter or AdapterConfig()
    nf4 = config.model.quantization or QuantizationConfig(type="nf4")
    plain = config.model.model_copy(update={"quantization": None})
    return {
        "full": config.model_copy(update={"model": plain, "adapter": None}),
        "lora": config.model_copy(update={"model": plain, "adapter": adapter}),
        "qlora": config.model_copy(
            update={"model": config.model.model_copy(update={"quantization": nf4}), "adapter": adapter}
        ),
    }
