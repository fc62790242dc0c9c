"""The end of a model on compiled kernels, where it is plain: an RMS norm, a frozen linear head, cross-entropy.

Only supervised positions are normed, and there are no logits (`fused.native.head`). What a model does after its layers
is found out, not looked up: its own head is tried against a plain product, its norm against the kernel, once for each
model; that nothing comes between norm and head is seen in each pass by the backbone's result being the very tensor that
the norm gave.

Dimension names: T tokens, S supervised positions, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.engine.fused.layer import Norm
from lora_cli.engine.fused.native import head, kernels
from lora_cli.engine.fused.parts import norm_of
from lora_cli.engine.head import NoHead, backbone_of, head_of, instead, trained_in_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALES = (1.0, 1000.0)
"""Of the hidden states that are tried: a cap shows at large logits, an added bias at small ones."""
_NEAR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of the largest value: how far the norm's kernel may be from the model's own norm."""


@dataclass(frozen=True, eq=False)
class Ending:
    """The parts of a plain ending at this moment."""

    backbone: nn.Module
    norm: nn.Module | None
    """The backbone's last module; None where it isn't a plain norm, and the backbone runs it."""
    linear: nn.Linear

    def hidden(self, run: Callable[[], Any]) -> tuple[Tensor, Norm | None]:
        """[T, M] hidden states of the backbone that `run` calls, and the norm that they still want."""
        given: list[Tensor] = []
        if self.norm is None:
            return run().last_hidden_state.squeeze(0), None

        def stand_still(hidden: Tensor) -> Tensor:
            given.append(hidden.view_as(hidden))  # another tensor: it may be the input that is looked for
            return given[-1]

        with instead(self.norm, stand_still):
            found = run().last_hidden_state
        if len(given) == 1 and found is given[0]:
            return found.squeeze(0), norm_of(self.norm)
        _known[self.backbone] = (self.norm, False)
        return run().last_hidden_state.squeeze(0), None


def ending_of(model: PreTrainedModel, positions: int) -> Ending | None:
    """The model's ending, if it is plain and the kernels fit so many supervised positions; None for anything else."""
    try:
        backbone = backbone_of(model)
    except NoHead:
        return None
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or _changed(linear) or trained_in_head(model, backbone):
        return None
    if not head.takes(linear.weight, positions) or not _once(
        model, linear, partial(_is_plain, model, backbone, linear)
    ):
        return None
    norm = backbone._modules.get("norm")
    parts = None if norm is None or _changed(norm) else norm_of(norm)
    if norm is not None and parts is not None:
        right = partial(_is_rms_norm, norm, parts, linear.weight.dtype)
        return Ending(backbone, norm if _once(backbone, norm, right) else None, linear)
    return Ending(backbone, None, linear)


_known: WeakKeyDictionary[nn.Module, tuple[nn.Module | None, bool]] = WeakKeyDictionary()
"""By model its head, and by backbone its norm, each with what its trial said."""


def _once(owner: nn.Module, part: nn.Module | None, trial: Callable[[], bool]) -> bool:
    known = _known.get(owner)
    if known is None or known[0] is not part:
        known = _known[owner] = (part, trial())
    return known[1]


def _changed(module: nn.Module) -> bool:
    """Whether calls of the module do more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _is_plain(model: PreTrainedModel, backbone: nn.Module, linear: nn.Linear) -> bool:
    """Whether the model's logits are this product, and it is right at these sizes."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    if not head.holds(linear.in_features, linear.out_features, linear.weight.dtype, linear.bias is not None):
        return False
    own = head_of(model, backbone, BaseModelOutputWithPast)
    try:
        with torch.no_grad():
            for scale in _SCALES:
                hidden = _random(linear.weight.dtype, linear.in_features) * scale
                expected = F.linear(hidden, linear.weight, linear.bias).float()
                apart = (own(hidden).float() - expected).abs().max()
                if not apart <= 1e-6 * expected.abs().max():
                    return False
    except Exception:  # an architecture's own code may ask its backbone for more
        return False
    return True


def _is_rms_norm(norm: nn.Module, parts: Norm, dtype: torch.dtype) -> bool:
    """Whether the norm's own code computes what the kernel does."""
    rows = _random(dtype, parts.weight.numel()) * 3
    if parts.weight.dtype != dtype or parts.weight.shape != rows.shape[1:]:
        return False
    with torch.no_grad():
        expected = norm(rows).float()
        found = kernels.rms_norm(rows.clone(), parts.weight, parts.eps).float()
    return bool((found - expected).abs().max() <= _NEAR[dtype] * expected.abs().max())


def _random(dtype: torch.dtype, width: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def ending_losses(
    ending: Ending, run: Callable[[], Any], predictors_S: Tensor, targets_S: Tensor, groups: tuple[Tensor, int] | None
) -> Tensor:
    """The sum of cross-entropies, a float32 scalar, or with `groups` ([S] int64, their number) each group's, [count].

    Args:
        run: call the backbone.
    """
    hidden_TM, norm = ending.hidden(run)
    linear = (ending.linear.weight, ending.linear.bias)
    losses: Tensor = _Ending.apply(hidden_TM, norm, *linear, predictors_S, targets_S, groups)  # type: ignore[no-untyped-call]
    return losses


class _Ending(torch.autograd.Function):
    """Losses from hidden states [T, M]; gradients are taken on the way there, and scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TM: Tensor,
        norm: Norm | None,
        weight_VM: Tensor,
        bias_V: Tensor | None,
        predictors_S: Tensor,
        targets_S: Tensor,
        groups: tuple[Tensor, int] | None,
    ) -> Tensor:
        x_SM = hidden_TM.index_select(0, predictors_S)
        normed_SM = x_SM if norm is None else kernels.rms_norm(x_SM, norm.weight, norm.eps)
        losses_S, grad_SM = head.losses(normed_SM, weight_VM, bias_V, targets_S)
        if norm is not None:
            nothing = torch.zeros_like(x_SM)
            grad_SM = kernels.rms_norm_back(grad_SM, x_SM, norm.weight, nothing, norm.eps)
        ctx.shape, ctx.grouped = hidden_TM.shape, groups is not None
        ctx.save_for_backward(grad_SM, predictors_S, *(() if groups is None else (groups[0],)))
        if groups is None:
            return losses_S.sum()
        return losses_S.new_zeros(groups[1]).index_add_(0, groups[0], losses_S)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_SM, predictors_S, *groups = ctx.saved_tensors
        factor = grad[groups[0], None] if ctx.grouped else grad
        back_TM = grad_SM.new_zeros(cast(torch.Size, ctx.shape))
        back_TM.index_copy_(0, predictors_S, grad_SM * factor.to(grad_SM.dtype))
        return (back_TM, None, None, None, None, None, None)
