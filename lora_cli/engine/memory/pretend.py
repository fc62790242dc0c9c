"""Plain `meta` tensors that behave, to whoever asks, like tensors on the target.

Three things depend on the device above the dispatcher, where a `meta` tensor would go another way, and are answered
here: what Python asks (`tensor.device`, `is_cuda`, `torch.cuda.*`), which kernel a composite operator picks (attention,
softmax of float16, dropout), and the casts of autocast. Everything below is the operators' own `meta` kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from lora_cli.engine.memory.casts import cast_arguments
from lora_cli.engine.target import Target

aten = torch.ops.aten
_META = torch.device("meta")

_GET_DEVICE = Tensor.device.__get__
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_IS_CPU = Tensor.is_cpu.__get__  # type: ignore[attr-defined]


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Within it, `meta` is the target."""
    with ExitStack() as stack:
        if target.kind == "cuda":
            for name, answer in _answers(target).items():
                stack.enter_context(mock.patch(name, answer))
        mode = _Pretend(target)
        run_backward = vars(torch.autograd)["_engine_run_backward"]

        def with_mode(*args: Any, **kwargs: Any) -> Any:
            with mode:  # which PyTorch suspends within `backward`, while recomputed layers need it
                return run_backward(*args, **kwargs)

        # A recomputed tensor is compared with the first one's device, asked for once inside this mode and once outside.
        stack.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda _: None))
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", with_mode))
        stack.enter_context(mode)
        yield


def _answers(target: Target) -> dict[str, Callable[..., Any]]:
    """What PyTorch asks of its build or of the driver, to decide what to run."""
    return {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: target.native_bfloat16,
        "torch.cuda.get_device_capability": lambda *args, **kwargs: target.capability,
        "torch.cuda.synchronize": lambda *args, **kwargs: None,
        "torch.utils._foreach_utils._get_foreach_kernels_supported_devices": lambda: ["cuda", "meta"],
        "torch.utils._foreach_utils._get_fused_kernels_supported_devices": lambda: ["cuda", "cpu", "meta"],
        "torch.optim.optimizer._get_foreach_kernels_supported_devices": lambda: ["cuda", "meta"],
    }


class _Pretend(TorchFunctionMode):
    def __init__(self, target: Target) -> None:
        super().__init__()
        self._device = target.device
        self._target = target
        self._composites = _COMPOSITES[target.kind]
        self._weight_casts: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _GET_DEVICE:
            device = func(*args)
            return self._device if device.type == "meta" else device
        if func in (_IS_CUDA, _IS_CPU):
            if _GET_DEVICE(args[0]).type != "meta":
                return func(args[0])
            return self._target.kind == ("cuda" if func == _IS_CUDA else "cpu")
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._really(kwargs["device"])}
        if func is Tensor.tolist and _GET_DEVICE(args[0]).type == "meta":
            return torch.zeros(args[0].shape).tolist()
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(self._index(item) for item in args[1]))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device | str):
            args = (args[0], self._really(args[1]), *args[2:])
        if torch.is_autocast_enabled(self._device.type):
            args, kwargs = cast_arguments(func, args, kwargs, self._target.kind, self._weight_casts)
        elif self._weight_casts:
            self._weight_casts.clear()
        composite = self._composites.get(func)
        if composite is not None:
            return composite(self._target, func, args, kwargs)
        return func(*args, **kwargs)

    def _really(self, device: Any) -> torch.device:
        """Where a tensor that is asked for on the target's device has to go."""
        wanted = torch.device(device)
        return _META if wanted.type == self._device.type else wanted

    def _index(self, item: Any) -> Any:
        """The `[-1]` of `x[..., [-1]]`, which otherwise stays on the host: indexing brings it to the target's device
        (`aten/src/ATen/native/IndexingUtils.h`)."""
        listed = isinstance(item, list) and all(type(number) is int for number in item)
        return torch.empty(len(item), dtype=torch.int64, device="meta") if listed else item


def _attention(target: Target, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.scaled_dot_product_attention` on CUDA: flash where it can, else memory-efficient, else written out.

    After `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`: flash from Ampere on, for 16 bits, without a mask;
    memory-efficient without grouped heads, and in bfloat16 from Ampere on. cuDNN's, first choice on Hopper in some
    releases, takes as much memory as flash.
    """
    query, key, value, mask, dropout, causal, scale, grouped = _attention_arguments(*args, **kwargs)
    half = query.dtype in (torch.float16, torch.bfloat16)
    ampere = target.capability >= (8, 0)
    groups = query.shape[1] // key.shape[1]
    if half and ampere and mask is None and query.shape[-1] <= 256 and query.shape[-1] == value.shape[-1]:
        return _flash(query, key, value, dropout, causal, scale)
    unfused = (grouped and groups > 1) or (query.dtype == torch.bfloat16 and not ampere)
    if target.attention_kernel == "efficient":
        unfused = False
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if unfused:
        return aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    if mask is not None:
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    trained = any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, trained, dropout, causal, scale=scale)[
        0
    ]


def _attention_on_cpu(target: Target, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On a CPU: its own flash kernel, else written out; `aten/src/ATen/native/transformers/sdp_utils_cpp.cpp`."""
    query, key, value, mask, dropout, causal, scale, grouped = _attention_arguments(*args, **kwargs)
    if dropout or query.shape[-1] != value.shape[-1]:
        return aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )[0]
    if mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=mask, scale=scale
    )[0]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`aten/src/ATen/native/transformers/attention.cpp`, convert_boolean_attn_mask."""
    zero, never = (torch.scalar_tensor(value, dtype=dtype, device="meta") for value in (0.0, float("-inf")))
    return torch.where(mask, zero, never)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, scale: float | None) -> Tensor:
    """Head sizes are padded to a multiple of 8."""
    size = query.shape[-1]
    padding = -size % 8
    if padding:
        query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
        scale = size**-0.5 if scale is None else scale
    output: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, False, scale=scale)[0]
    return output[..., :size] if padding else output


def _attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def _softmax(target: Target, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On CUDA float16 is widened inside the kernel; `aten/src/ATen/native/SoftMax.cpp`."""
    x, dtype = args[0], kwargs.get("dtype")
    dimension = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if x.dtype == torch.float16 and dtype == torch.float32:
        kernel = torch._log_softmax if func in (F.log_softmax, torch.log_softmax) else torch._softmax
        return kernel(x, dimension, True)
    return func(*args, **kwargs)


def _dropout(target: Target, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On CUDA a fused kernel keeps a mask of one byte each; `aten/src/ATen/native/Dropout.cpp`."""
    x, p, training, inplace = _dropout_arguments(*args, **kwargs)
    if not training or not 0 < p < 1 or inplace:
        return func(*args, **kwargs)
    return torch.native_dropout(x, p, True)[0]


def _dropout_arguments(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return input, p, training, inplace


_ON_CUDA: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.softmax: _softmax,
    F.log_softmax: _softmax,
    torch.softmax: _softmax,
    torch.log_softmax: _softmax,
    Tensor.softmax: _softmax,
    Tensor.log_softmax: _softmax,
    F.dropout: _dropout,
    torch.dropout: _dropout,
}
_COMPOSITES = {"cuda": _ON_CUDA, "cpu": {F.scaled_dot_product_attention: _attention_on_cpu}}
