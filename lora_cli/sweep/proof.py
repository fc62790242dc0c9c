"""A proof before the run: on a small random copy of the model, members side by side get what each gets alone.

Whatever a model's own code does to a row of several members (experts that see some tokens, layers that look across
the row), it shows here as a loss or a gradient that differs, or as an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lora_cli.config import AdapterConfig
from lora_cli.engine.assembly import causal_lm
from lora_cli.engine.batch import flatten
from lora_cli.engine.computation import Computation
from lora_cli.engine.distance import distance
from lora_cli.engine.miniature import NoMiniature, miniature
from lora_cli.engine.selftest import TOLERANCE
from lora_cli.errors import ModelError
from lora_cli.model.adapter import attach_adapter
from lora_cli.sweep.row import NotOneRow, Row
from lora_cli.sweep.stack import Adapter, Stack

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LENGTHS = (11, 6)
_MEMBERS = 3
"""At most so many different adapters are tried; two of one kind if there is only one."""


def prove_sharing(architecture: PretrainedConfig, computation: Computation, adapters: Sequence[AdapterConfig]) -> float:
    """The largest relative difference between members side by side and each alone, in loss or gradient.

    Raises:
        ModelError: they differ, or the model can't run so.
    """
    distinct = list({adapter.model_dump_json(exclude={"lora_dropout"}): adapter for adapter in adapters}.values())
    tried = [*distinct[:_MEMBERS], *distinct[:1]]
    plain = Computation(computation.packing, computation.loss, torch.float32, computation.attention)
    try:
        apart = _largest_difference(miniature(architecture), plain, tried)
    except NoMiniature as error:
        raise _refused(architecture, f"no small copy of it to prove that on ({error})") from error
    except NotOneRow as error:
        raise _refused(architecture, "an adapted layer doesn't see the whole row") from error
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refused(architecture, line) from error
    if not apart <= TOLERANCE:
        raise _refused(architecture, f"losses or gradients differ by {apart:.1e} from those of each alone")
    return apart


def _refused(architecture: PretrainedConfig, why: str) -> ModelError:
    return ModelError(
        f"{architecture.model_type} can't be trained with several adapters at once: {why}",
        remedy="Train the members one by one with lora train.",
    )


def _largest_difference(base: PreTrainedModel, computation: Computation, configs: Sequence[AdapterConfig]) -> float:
    base.requires_grad_(False)
    computation.prepare(base)
    adapters, parameters = [], []
    for number, config in enumerate(configs):
        plain = config.model_copy(update={"layers_to_transform": None, "path": None, "lora_dropout": 0.0})
        model = attach_adapter(base, plain, seed=number)
        trained = [p for p in causal_lm(model).parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in trained:  # a zero B hides every gradient of A
                parameter.normal_(std=0.1, generator=generator)
        parameters.append(trained)
        adapters.append(Adapter.taken_from(base, model))
    stack = Stack(base, adapters)
    row = Row(stack)
    draw = np.random.Generator(np.random.PCG64(0))
    documents = [draw.integers(3, 60, length) for length in _LENGTHS]
    if computation.packing == "single":
        documents = documents[:1]
    everything = [p for own in parameters for p in own]

    def batch(copies: int) -> tuple[Tensor, ...]:
        trained = [np.ones(len(d), dtype=bool) for d in documents * copies]
        flat = flatten(documents * copies, trained, torch.device("cpu"))
        groups = flat.documents // len(documents)
        sums = computation.group_losses(base, flat, groups, copies)
        # Apart from each other, and every member's loss with a weight of its own.
        weights = torch.arange(1, copies + 1, dtype=torch.float32)
        return sums.detach(), *torch.autograd.grad(
            (sums * weights).sum(), everything, allow_unused=True, materialize_grads=True
        )

    tokens = sum(_LENGTHS[: len(documents)])
    alone: list[tuple[Tensor, ...]] = []
    together: list[tuple[Tensor, ...]] = []
    for number in range(len(adapters)):
        with stack.seated(number):
            alone.append(batch(1))
    with row.running():
        for first in range(0, len(adapters), 1 if computation.packing == "single" else len(adapters)):
            members = [first] if computation.packing == "single" else list(range(len(adapters)))
            row.seats = tuple((member, tokens) for member in members)
            together.append(batch(len(members)))
    return _compare(alone, together, [len(own) for own in parameters])


def _compare(alone: list[tuple[Tensor, ...]], together: list[tuple[Tensor, ...]], counts: Sequence[int]) -> float:
    sums = torch.cat([each[0] for each in together])
    worst = distance(sums, torch.cat([each[0] for each in alone]))
    start = 1
    for member, count in enumerate(counts):
        weight = 1 if len(together) > 1 else member + 1
        own = torch.cat([grad.flatten() for grad in alone[member][start : start + count]]) * weight
        shared = sum(torch.cat([grad.flatten() for grad in each[start : start + count]]) for each in together)
        assert isinstance(shared, Tensor)
        worst = max(worst, distance(shared, own))
        start += count
    return worst
