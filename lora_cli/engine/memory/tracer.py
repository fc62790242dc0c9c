"""A dispatch mode that records when each storage is born and dies, on `meta` and on real tensors alike.

Knows phases (forward, backward, update) from the calls that begin them, and layers from hooks; the step itself is
untouched. Kernels' own scratch memory, which no operator returns, comes from `scratch`. Python's garbage collector
stands still while it records, so that the same step leaves the same trace.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli.engine.memory.allocator import rising_below
from lora_cli.engine.memory.operations import flops_of
from lora_cli.engine.memory.scratch import LT_WORKSPACE_BYTES, Scratch, libraries, workspace_bytes
from lora_cli.engine.memory.shapes import KnownShapes
from lora_cli.engine.memory.trace import WORKSPACE, Birth, Trace
from lora_cli.engine.target import Target

aten = torch.ops.aten

_FROM_ENGINE = frozenset({aten.add.Tensor})
"""With which the autograd engine adds up gradients that meet at one tensor."""


class Tracer(TorchDispatchMode):
    """Records the storages of one device.

    Args:
        device_type: `meta`, or `cpu` for real tensors.
        target: whose kernels take and give back scratch memory within a call.
        vocabulary: a tensor whose last dimension is this is counted as logits.
        truth: what a condition on a `meta` tensor comes to. Models ask whether positions run on without a
            restart (`find_packed_sequence_indices`): true of a row that holds one document.
    """

    def __init__(self, device_type: str, target: Target, vocabulary: int | None = None, *, truth: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace(rising_below=rising_below(target.capability))
        self.phase = "load"
        self.place = ""
        self._device_type = device_type
        self._scratch = Scratch(target)
        # Finite; and on CUDA, where step counts lie on the host, no overflow of a float16 gradient.
        self._number = 0 if target.kind == "cuda" else 1
        self._vocabulary = vocabulary
        self._truth = truth
        self._aside = False
        self._in_engine = False
        self._within = False
        self._alive: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._sum: _Sum | None = None
        self._shapes = KnownShapes() if device_type == "meta" else None
        on_card = device_type == "meta" and target.kind == "cuda"
        self._workspaces = {"cublas": workspace_bytes(target), "cublaslt": LT_WORKSPACE_BYTES} if on_card else {}
        self._taken: set[tuple[str, bool]] = set()

    def __enter__(self) -> Tracer:
        gc.disable()
        run_backward = vars(torch.autograd)["_engine_run_backward"]  # perhaps wrapped already

        def in_phase(*args: Any, **kwargs: Any) -> Any:
            before, self._in_engine = self._in_engine, True
            try:
                with self.during("backward") if kwargs.get("accumulate_grad") else nullcontext():
                    return run_backward(*args, **kwargs)
            finally:
                self._in_engine = before

        self._patch = mock.patch("torch.autograd._engine_run_backward", in_phase)
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._patch.stop()
        gc.enable()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # kernels must not be told of the target: below here all is `meta`
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._aside:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._truth if args[0].dtype == torch.bool else self._number
        parts = self._scratch.parts(func) if self._device_type == "meta" else None
        if parts is not None and not self._within:
            return self._record_within(parts, args, kwargs)
        sizes = self._scratch.sizes(func, args)
        result = self._shapes.run(func, args, kwargs) if self._shapes is not None else func(*args, **kwargs)
        if type(result) is Tensor:
            self._see(result, func, args)
        elif isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item, func, args)
        if self._workspaces:
            self._take_workspaces(func, args)
        if self._shapes is not None:
            self.trace.count(flops_of(func, args, kwargs, result))
        if sizes:
            self.take_and_give_back(sizes, str(func))
        return result

    def _take_workspaces(self, func: Any, args: tuple[Any, ...]) -> None:
        """Those that a thread asks for the first time; autograd's engine has one of its own for a card, which also runs
        the gradients that the loss takes on the way there."""
        for library in libraries(func, args):
            key = (library, self._in_engine)
            if key not in self._taken:
                self._taken.add(key)
                operator = WORKSPACE if library == "cublas" else library
                self._birth(self._workspaces[library], "workspace", operator)

    def _record_within(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose operators are recorded one by one; PyTorch suspends this mode while it handles an operator."""
        super().__enter__()  # type: ignore[no-untyped-call]
        self._within = True
        try:
            return call(*args, **kwargs)
        finally:
            self._within = False
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def take_and_give_back(self, sizes: Iterable[int], operator: str) -> None:
        """Blocks that live only within one call."""
        numbers = [self._birth(size, "workspace", operator) for size in sizes]
        for number in reversed(numbers):
            self.trace.free(number)

    def register(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Storages that were there before, as born now, or the kind of those that are known."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                if tensor.device.type == self._device_type:
                    storage = tensor.untyped_storage()
                    number = self._alive.get(storage._cdata)
                    if number is None:
                        self._follow(storage, self._birth(storage.nbytes(), kind, ""))
                    else:
                        self.trace.births[number].kind = kind

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, nothing is recorded: what happens here would not happen on the card."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def begin(self, phase: str) -> None:
        self.phase = phase
        self.trace.mark(phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        self.trace.mark(phase)
        try:
            yield
        finally:
            self.phase = before
            self.trace.mark(before)

    def watch_layers(self, model: nn.Module) -> None:
        """Note which layer is at work."""
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for number, layer in enumerate(module):
                    layer.register_forward_pre_hook(self._entering(f"{name}.{number}"))
                return

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note which storages become gradients."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            number = self._alive.get(parameter.grad.untyped_storage()._cdata)
            if number is not None:
                self.trace.births[number].kind = "gradients"

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.place = name

        return hook

    def _see(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._settle_sum()
        number = self._birth(storage.nbytes(), self._kind(tensor), func.name())
        self._follow(storage, number)
        if func in _FROM_ENGINE and self.phase == "backward" and not torch.is_grad_enabled():
            self._await_sum(number, storage._cdata, args)

    def _birth(self, size_bytes: int, kind: str, operator: str) -> int:
        return self.trace.allocate(Birth(size_bytes, kind, self.phase, self.place, operator))

    def _follow(self, storage: torch.UntypedStorage, number: int) -> None:
        key = storage._cdata
        self._alive[key] = number

        def died(_: object) -> None:
            del self._references[key]
            self.trace.free(self._alive.pop(key))

        self._references[key] = weakref.ref(storage, died)

    def _kind(self, tensor: Tensor) -> str:
        in_step = self.phase in ("forward", "backward")
        if in_step and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            return "logits and loss"
        if self.phase == "forward":
            return "saved activations"
        if self.phase == "backward":
            return "one layer recomputed" if torch.is_grad_enabled() else "backward temporaries"
        return "optimizer" if self.phase == "update" else "other"

    def _await_sum(self, number: int, key: int, args: tuple[Any, ...]) -> None:
        """The engine's sum of two gradients, which without a dispatch mode goes in place where it can.

        It does where nothing else holds the left one, or else the right one: then that storage dies right here.
        """
        addends = [self._alive.get(t.untyped_storage()._cdata) for t in args if isinstance(t, Tensor)]
        sizes = self.trace.births[number].size_bytes
        same = [a for a in addends if a is not None and self.trace.births[a].size_bytes == sizes]
        if same:
            self._sum = _Sum(number, key, len(self.trace.events) - 1, same)

    def _settle_sum(self) -> None:
        """Whether the last sum went in place shows by what has died since."""
        pending, self._sum = self._sum, None
        if pending is None:
            return
        events = self.trace.events
        died = events[pending.position + 1 :]
        reused = next((a for a in pending.addends if -(a + 1) in died), None)
        if reused is None:
            return
        tail = [e for e in died if e != -(reused + 1)]
        events[pending.position :] = [-(reused + 1) if e == -(pending.number + 1) else e for e in tail]
        if self._alive.get(pending.key) == pending.number:
            self._alive[pending.key] = reused


class _Sum:
    __slots__ = ("addends", "key", "number", "position")

    def __init__(self, number: int, key: int, position: int, addends: list[int]) -> None:
        self.number, self.key, self.position, self.addends = number, key, position, addends
