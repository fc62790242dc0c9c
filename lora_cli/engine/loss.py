"""The loss of a micro-batch, at supervised positions only.

`chunked` runs the backbone once and the model's own head on a few positions at a time, taking the gradient on the
way, so that logits `[T, V]` never exist. `full` is transformers' own loss, for comparisons and for models whose head
can't be told apart from the rest. Both return the sum over supervised tokens, in float32: whoever calls divides.

Dimension names: T tokens, S supervised positions, C positions of a chunk, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.engine.ending import ending_losses, ending_of
from lora_cli.engine.fused import card
from lora_cli.engine.fused.native import kernels
from lora_cli.engine.head import Head, backbone_of, head_of, trained_in_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.engine.batch import FlatBatch

# Logit values that exist at once. On a CPU a chunk should stay near the caches; on CUDA it should fill the card.
_CHUNK_VALUES = {"cpu": 2**22, "cuda": 2**26}


def full_loss(model: PreTrainedModel, batch: FlatBatch, **attention: Any) -> Tensor:
    """transformers' own loss as a sum over the supervised tokens, a float32 scalar. All logits exist at once."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[0, batch.predictors + 1] = batch.targets
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=labels,
        use_cache=False,
        **attention,
    )
    if not batch.num_supervised_tokens:  # a mean over nothing isn't a number
        nothing: Tensor = output.logits.float().sum() * 0
        return nothing
    loss: Tensor = output.loss
    return loss.float() * batch.num_supervised_tokens


def chunked_loss(model: PreTrainedModel, batch: FlatBatch, native: bool = False, **attention: Any) -> Tensor:
    """The sum of the supervised tokens' losses, a float32 scalar. At most one chunk of logits exists at a time.

    Args:
        native: by compiled kernels, which are there: the model's whole ending where it is plain, or else
            cross-entropies.
    """
    ending = ending_of(model, batch.num_supervised_tokens) if native and torch.is_grad_enabled() else None
    if ending is not None:
        return ending_losses(ending, _runner(model, batch, attention), batch.predictors, batch.targets, None)
    hidden_SM, head, parameters = _supervised_hidden(model, batch, attention)
    rows = _chunk_rows(hidden_SM.device, model.config.get_text_config().vocab_size)
    if not torch.is_grad_enabled():
        return torch.stack([piece.sum() for piece in _token_losses(hidden_SM, head, batch.targets, rows)]).sum()
    loss: Tensor = _ChunkedLoss.apply(hidden_SM, head, batch.targets, rows, native, *parameters)  # type: ignore[no-untyped-call]
    return loss


def token_losses(model: PreTrainedModel, batch: FlatBatch, **attention: Any) -> Tensor:
    """[S] losses of the supervised tokens in float32, without gradients, for evaluation."""
    with torch.no_grad():
        hidden_SM, head, _ = _supervised_hidden(model, batch, attention)
        rows = _chunk_rows(hidden_SM.device, model.config.get_text_config().vocab_size)
        return torch.cat(list(_token_losses(hidden_SM, head, batch.targets, rows)))


def full_token_losses(model: PreTrainedModel, batch: FlatBatch, **attention: Any) -> Tensor:
    """[S] losses as `token_losses` gives them, from the whole model's logits."""
    with torch.no_grad():
        logits_TV = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            **attention,
        ).logits[0]
        return F.cross_entropy(logits_TV[batch.predictors].float(), batch.targets, reduction="none")


def group_losses(
    model: PreTrainedModel, batch: FlatBatch, groups_S: Tensor, count: int, native: bool = False, **attention: Any
) -> Tensor:
    """[count] float32: `chunked_loss` of each group of supervised tokens; each sum takes a gradient of its own.

    For a head that isn't trained.

    Args:
        groups_S: [S], int64, below `count`.
        native: as in `chunked_loss`.
    """
    ending = ending_of(model, batch.num_supervised_tokens) if native else None
    if ending is not None:
        run = _runner(model, batch, attention)
        return ending_losses(ending, run, batch.predictors, batch.targets, (groups_S, count))
    hidden_SM, head, parameters = _supervised_hidden(model, batch, attention)
    assert not parameters, "the gradient of a head isn't kept apart by groups"
    rows = _chunk_rows(hidden_SM.device, model.config.get_text_config().vocab_size)
    sums: Tensor = _GroupLosses.apply(  # type: ignore[no-untyped-call]
        hidden_SM, head, batch.targets, groups_S, count, rows, native
    )
    return sums


def full_group_losses(
    model: PreTrainedModel, batch: FlatBatch, groups_S: Tensor, count: int, **attention: Any
) -> Tensor:
    """[count] losses as `group_losses` gives them, from the whole model's logits."""
    logits_TV = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False, **attention
    ).logits[0]
    losses_S = F.cross_entropy(logits_TV[batch.predictors].float(), batch.targets, reduction="none")
    return losses_S.new_zeros(count).index_add(0, groups_S, losses_S)


def _runner(model: PreTrainedModel, batch: FlatBatch, attention: dict[str, Any]) -> Callable[[], Any]:
    """A call of the backbone on a batch."""
    return partial(
        backbone_of(model),
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        **attention,
    )


def _supervised_hidden(
    model: PreTrainedModel, batch: FlatBatch, attention: dict[str, Any]
) -> tuple[Tensor, Head, list[nn.Parameter]]:
    """Hidden states at the predictors, the head, and what is trained in the head."""
    backbone, output = backbone_of(model), _runner(model, batch, attention)()
    hidden_SM = output.last_hidden_state.squeeze(0).index_select(0, batch.predictors)
    return hidden_SM, head_of(model, backbone, type(output)), trained_in_head(model, backbone)


def _chunk_rows(device: torch.device, vocabulary: int) -> int:
    return max(16, _CHUNK_VALUES.get(device.type, 2**26) // vocabulary)


def _token_losses(hidden_SM: Tensor, head: Head, targets_S: Tensor, rows: int) -> Iterator[Tensor]:
    for hidden_CM, targets_C in zip(hidden_SM.split(rows), targets_S.split(rows), strict=True):
        yield F.cross_entropy(head(hidden_CM).float(), targets_C, reduction="none")


def _filled_up(rows: Tensor, to: int = 128) -> Tensor:
    """Rows of 0 up to a multiple: oneDNN prepares a kernel in milliseconds for each new number of them."""
    return F.pad(rows, (*[0, 0] * (rows.dim() - 1), 0, -len(rows) % to))


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy summed over chunks; gradients are taken in the forward pass, while a chunk's logits exist.

    The loss is a sum, so what backward still has to do is to multiply by the gradient that comes in: the same
    arithmetic as recomputing the logits, once less. The idea is that of Liger's fused linear cross-entropy
    (arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SM: Tensor, head: Head, targets_S: Tensor, rows: int, native: bool, *parameters: Tensor
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden_SM.device)
        hidden_grads: list[Tensor] = []
        parameter_grads: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        for hidden_CM, targets_C in zip(hidden_SM.split(rows), targets_S.split(rows), strict=True):
            count = len(targets_C)
            if native and hidden_CM.dtype == torch.bfloat16:
                hidden_CM, targets_C = (_filled_up(each) for each in (hidden_CM, targets_C))
            with torch.enable_grad():
                hidden_CM = hidden_CM.detach().requires_grad_()
                logits_CV = head(hidden_CM)
            losses_C, grad_CV = _cross_entropy_and_gradient(logits_CV, targets_C, native)
            grad_CV[count:].zero_()
            grads = torch.autograd.grad(logits_CV, (hidden_CM, *parameters), grad_CV, allow_unused=True)
            del logits_CV, grad_CV
            loss += losses_C[:count].sum()
            hidden_grads.append(_given(grads[0], hidden_CM)[:count])
            for total, grad in zip(parameter_grads, grads[1:], strict=True):
                if grad is not None:
                    total += grad
        hidden_grad = torch.cat(hidden_grads) if hidden_grads else torch.zeros_like(hidden_SM)
        ctx.save_for_backward(hidden_grad, *parameter_grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *parameter_grads = ctx.saved_tensors
        return (hidden_grad * grad.to(hidden_grad.dtype), None, None, None, None, *(g * grad for g in parameter_grads))


class _GroupLosses(torch.autograd.Function):
    """`_ChunkedLoss` summed by group: what comes in for a group multiplies the gradients of its own rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SM: Tensor,
        head: Head,
        targets_S: Tensor,
        groups_S: Tensor,
        count: int,
        rows: int,
        native: bool,
    ) -> Tensor:
        sums = torch.zeros(count, dtype=torch.float32, device=hidden_SM.device)
        hidden_grads: list[Tensor] = []
        pieces = zip(hidden_SM.split(rows), targets_S.split(rows), groups_S.split(rows), strict=True)
        for hidden_CM, targets_C, groups_C in pieces:
            with torch.enable_grad():
                hidden_CM = hidden_CM.detach().requires_grad_()
                logits_CV = head(hidden_CM)
            losses_C, grad_CV = _cross_entropy_and_gradient(logits_CV, targets_C, native)
            hidden_grads += torch.autograd.grad(logits_CV, hidden_CM, grad_CV)
            del logits_CV, grad_CV
            sums.index_add_(0, groups_C, losses_C)
        hidden_grad = torch.cat(hidden_grads) if hidden_grads else torch.zeros_like(hidden_SM)
        ctx.save_for_backward(hidden_grad, groups_S)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, groups_S = ctx.saved_tensors
        return (hidden_grad * grad[groups_S, None].to(hidden_grad.dtype), None, None, None, None, None, None)


def _cross_entropy_and_gradient(logits_CV: Tensor, targets_C: Tensor, native: bool = False) -> tuple[Tensor, Tensor]:
    """[C] cross-entropies, float32, and the gradient of their sum in the dtype of the logits: softmax minus one at the
    target.

    The gradient takes the place of the logits wherever nobody needs them any more. On a card with Triton in one kernel.
    """
    spent = _is_product(logits_CV)
    with torch.no_grad():
        if logits_CV.is_cuda and logits_CV.is_contiguous() and (logits_CV.is_meta or card.available()):
            return card.cross_entropy(logits_CV.detach(), targets_C, in_place=spent)
        if native and spent and logits_CV.dtype in kernels.DTYPES and logits_CV.is_contiguous():
            grad_CV = logits_CV.detach()
            return kernels.cross_entropy(grad_CV, targets_C), grad_CV
        values_CV = logits_CV.detach().float()
        target_C1 = targets_C[:, None]
        largest_C1, wanted_C1 = values_CV.amax(-1, keepdim=True), values_CV.gather(-1, target_C1)
        ours = values_CV.device.type == "cpu" and (values_CV.dtype != logits_CV.dtype or spent)
        grad_CV = torch.softmax(values_CV, -1, out=values_CV) if ours else torch.softmax(values_CV, -1)
        # The largest probability is 1 / sum(exp(x - largest)): the logarithm of the sum, without a pass of its own.
        log_sum_C1 = largest_C1 - grad_CV.amax(-1, keepdim=True).log()
        losses_C = (log_sum_C1 - wanted_C1).squeeze(-1)
        grad_CV.scatter_add_(-1, target_C1, torch.full_like(wanted_C1, -1.0))
        return losses_C, grad_CV.to(logits_CV.dtype)


def _is_product(logits: Tensor) -> bool:
    """Whether the logits are a matrix product as it came, whose backward pass doesn't look at its result."""
    node = logits.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and type(node).__name__ in ("MmBackward0", "AddmmBackward0")


_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1", "SelectBackward0", "SliceBackward0"})


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
