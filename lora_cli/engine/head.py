"""A causal language model as a backbone and what comes after it, run apart from each other.

Dimension names: C positions, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]
"""[C, M] hidden states to [C, V] logits."""


class NoHead(Exception):
    """The model's head can't be run apart from its backbone."""


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that its own forward calls for hidden states.

    Raises:
        NoHead: the model doesn't name one.
    """
    backbone = model.get_decoder()  # not the `base_model`: OPT's forward calls the decoder inside it
    if backbone is model:  # Llama 4 keeps it under another name than the one that it announces
        backbone = model._modules.get("model")
    if not isinstance(backbone, nn.Module):
        raise NoHead(f"{type(model).__name__} names no backbone")
    return backbone


def head_of(model: PreTrainedModel, backbone: nn.Module, output_type: type) -> Head:
    """Whatever the model does after its backbone: Cohere scales its logits, Gemma 2 caps them, Granite divides them.

    The model's own forward is run with the backbone standing still, so nothing of it needs to be known here.
    """

    def head(hidden_CM: Tensor) -> Tensor:
        output = output_type(last_hidden_state=hidden_CM[None])
        with instead(backbone, lambda *args, **kwargs: output):
            logits: Tensor = model(inputs_embeds=hidden_CM[None], use_cache=False).logits
        return logits.squeeze(0)  # indexing would copy them on the way back

    return head


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, the module runs `forward`."""
    own = module.__dict__.get("forward")  # set where something else has replaced it for this instance
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def trained_in_head(model: PreTrainedModel, backbone: nn.Module) -> list[nn.Parameter]:
    """What is trained outside of the backbone, and in output embeddings wherever they are; each once."""
    embeddings = model.get_output_embeddings()
    tied = () if embeddings is None else embeddings.parameters()
    found = {id(parameter): parameter for parameter in (*_outside(model, backbone), *tied)}
    return [parameter for parameter in found.values() if parameter.requires_grad]


def _outside(module: nn.Module, backbone: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters without the backbone's: to walk over those as well takes milliseconds, in each micro-batch."""
    if module is backbone:
        return
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        yield from _outside(child, backbone)
