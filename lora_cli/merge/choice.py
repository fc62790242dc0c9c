"""Which weights a quantized run's adapter is merged into: the original ones, or the quantized ones it was trained on.

The adapter has learned to make up for the quantization error, so the latter nearly always come closer to the trained
model; where numbers may be taken, they decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.errors import UserError
from lora_cli.merge.adapter import AdaptedModel
from lora_cli.merge.base import Base
from lora_cli.merge.merger import Merger
from lora_cli.merge.result import BaseChoice, ChosenBase
from lora_cli.merge.verification import Stage, distance
from lora_cli.merge.work import plan_work


def choose_base(
    stage: Stage | None,
    base: Base,
    adapted: AdaptedModel,
    asked: BaseChoice | None,
    dtype: torch.dtype | None,
) -> tuple[ChosenBase, Tensor | None]:
    """The choice, and the logits of the trained model where they were needed for it. No `stage`: nothing is measured.

    Raises:
        UserError: quantized weights are asked for, and the run had none.
    """
    if base.packed is not None:
        if asked == "original":
            raise UserError(
                f"--base original: {base.folder.absolute()} itself lies on disk in {base.packed}; it has no others",
                remedy="Leave --base away: the weights that it was trained on can be unpacked exactly.",
            )
        return ChosenBase("quantized", f"its {base.packed} weights on disk, unpacked as in training"), None
    if base.quantized is None:
        if asked == "quantized":
            raise UserError(
                "--base quantized: this adapter wasn't trained on a quantized base",
                remedy="Leave --base away, or give the run folder, whose config says how it was trained.",
            )
        return ChosenBase("original", "the weights that it was trained on"), None
    name = base.quantized.settings.type
    if stage is None:
        why = "as asked" if asked else f"the {name} weights that it was trained on; not measured"
        return ChosenBase(asked or "quantized", why), None
    trained = stage.adapter_logits(as_quantized=True)
    divergence: dict[BaseChoice, float] = {}
    choices: tuple[BaseChoice, BaseChoice] = ("original", "quantized")
    for choice in choices:
        as_quantized = choice == "quantized"
        work = plan_work(base, adapted, as_quantized=as_quantized, dtype=dtype)
        merger = Merger(base, adapted, as_quantized=as_quantized)
        divergence[choice] = distance(trained, stage.candidate_logits(work, merger)).kl
    best: BaseChoice = min(divergence, key=lambda choice: divergence[choice])
    chosen = asked or best
    other: BaseChoice = "original" if chosen == "quantized" else "quantized"
    why = (
        f"{'as asked; ' if asked else ''}KL to the model as it was trained {divergence[chosen]:.1e}, "
        f"with the {other} weights {divergence[other]:.1e}"
    )
    return ChosenBase(chosen, why, divergence["original"], divergence["quantized"]), trained
