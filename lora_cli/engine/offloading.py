"""What checkpointed layers keep, in host memory: a layer's input leaves the card while the layer runs, and comes back
while the layer behind it is recomputed.

Copies have a stream of their own, and memory on the card is taken and given back by the stream that computes, in an
order that depends on the layers alone: what a rehearsal on `meta` sees is what happens on a card. On a CPU an input
lies in host memory as it is. Knows nothing of layers but their input; `torch.utils.checkpoint` and a fused layer keep
theirs as saved tensors, which is where it is taken from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Checkpoint = Callable[..., Any]
"""`torch.utils.checkpoint.checkpoint` with its settings: (function, *arguments) to the function's result."""


class Offloading:
    """A way to checkpoint layers that takes their inputs to the host. One for all layers of a model.

    Args:
        checkpoint: recomputes a layer from its input.
        tokens: of a full micro-batch. Page-locked memory, which takes long to get, is taken for so many at once.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: int = 0) -> None:
        self._checkpoint = checkpoint
        self._tokens = tokens
        self._copies: torch.cuda.Stream | None = None
        self._last: weakref.ref[_Away] | None = None
        self._leaving: _Away | None = None
        self._places: list[Tensor] = []
        self.host_bytes = 0
        """The most page-locked memory that a pass has had."""

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint `run(*args)`, whose first argument is the layer's input."""
        if not args or not isinstance(args[0], Tensor):
            return self._checkpoint(run, *args)
        with self.keeping(args[0]):
            return self._checkpoint(run, *args)

    @contextmanager
    def keeping(self, hidden: Tensor) -> Iterator[None]:
        """Within it, this layer's input is kept on the host where autograd saves it; all else where it is."""
        # Numbers alone: autograd keeps this hook as long as what it packed, and must not keep the input by it.
        storage, count = hidden.untyped_storage()._cdata, hidden.numel()

        def pack(saved: Tensor) -> Any:
            whole = saved.untyped_storage()._cdata == storage and saved.numel() == count
            return self._put(saved) if whole and _leaves(saved) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield

    def _put(self, saved: Tensor) -> _Away:
        before = None if self._last is None else self._last()
        if before is not None and before.fetched:
            before = None  # of a pass that is over
        away = _Away(self, saved.detach(), before)
        away.leave()
        if self._leaving is not None:
            self._leaving.left()
        self._leaving, self._last = away, weakref.ref(away)
        self.host_bytes = max(self.host_bytes, away.host_bytes)
        return away

    def stays(self, away: _Away) -> bool:
        """Whether this input is still on the card, as the last layer's is when its turn comes; it is forgotten here."""
        still, self._leaving = self._leaving is away, None
        return still

    def room(self, hidden: Tensor) -> int:
        """Values for which a place is made when it has to hold this."""
        return max(hidden.numel(), self._tokens * hidden.shape[-1])

    def place(self, number: int, hidden: Tensor) -> Tensor:
        """Page-locked memory of this input's shape: that which the layer of this number had before, if it is enough.

        All copies have one stream, so that what lay there has come back before anything else is copied to it.
        """
        while number >= len(self._places):
            self._places.append(torch.empty(0))
        place = self._places[number]
        if place.dtype != hidden.dtype or place.numel() < hidden.numel():
            place = self._places[number] = _page_locked(self.room(hidden), hidden.dtype)
        return place[: hidden.numel()].view(hidden.shape)

    def copies(self) -> torch.cuda.Stream:
        """The stream of copies, which waits for what the card has to compute by now."""
        if self._copies is None:
            self._copies = torch.cuda.Stream()
        self._copies.wait_stream(torch.cuda.current_stream())
        return self._copies


class _Away:
    """One layer's input, out of the card between its two uses."""

    def __init__(self, owner: Offloading, hidden: Tensor, before: _Away | None) -> None:
        self._owner = owner
        self._shape, self._dtype, self._device = hidden.shape, hidden.dtype, hidden.device
        self._on_card: Tensor | None = hidden
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._before = None if before is None else weakref.ref(before)
        """That of the layer before it, which is needed next on the way back."""
        self.number: int = 0 if before is None else before.number + 1
        own = _page_locked_bytes(owner.room(hidden) * hidden.element_size())
        self.host_bytes: int = own + (0 if before is None else before.host_bytes)
        """Of this and all before it."""
        self.fetched = False

    def leave(self) -> None:
        """Begin the copy to the host; the input stays on the card until `left`."""
        hidden = self._on_card
        assert hidden is not None
        if not hidden.is_meta:
            self._host = self._owner.place(self.number, hidden)
            self._copy(self._host, hidden)

    def left(self) -> None:
        """Give its memory on the card back, from where the copy is over."""
        self._wait()
        self._on_card = None

    def fetch(self) -> Tensor:
        """The input, on the card; that of the layer before it begins to come back."""
        if not self._owner.stays(self):
            self.come_back()
        self._wait()
        before = None if self._before is None else self._before()
        if before is not None:
            before.come_back()
        hidden, self.fetched = self._on_card, True
        self._on_card = self._host = None
        assert hidden is not None, "saved for one way back"
        return hidden

    def come_back(self) -> None:
        """Begin the copy to the card."""
        if self._on_card is not None or self.fetched:
            return
        self._on_card = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        if self._host is not None:
            self._copy(self._on_card, self._host)

    def _copy(self, to: Tensor, of: Tensor) -> None:
        with torch.cuda.stream(self._owner.copies()):
            to.copy_(of, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def __del__(self) -> None:
        # A pass that was given up: its copy must be over before what comes next is given the same memory.
        self._wait()


def offload(model: nn.Module, tokens: int = 0) -> Offloading | None:
    """Take the inputs of a model's checkpointed layers to the host from now on; None where it checkpoints none.

    Args:
        tokens: of a full micro-batch.
    """
    found = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    if not found:
        return None
    offloading = Offloading(vars(found[0])["_gradient_checkpointing_func"], tokens)
    for module in found:
        vars(module)["_gradient_checkpointing_func"] = offloading
    return offloading


def offloading_of(module: nn.Module) -> Offloading | None:
    """What takes this layer's input to the host, if anything does."""
    found = vars(module).get("_gradient_checkpointing_func")
    return found if isinstance(found, Offloading) else None


def most_on_host(model: nn.Module) -> int:
    """Bytes of page-locked memory that a pass of the model has had at the most."""
    return max((found.host_bytes for found in map(offloading_of, model.modules()) if found is not None), default=0)


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept.fetch() if isinstance(kept, _Away) else kept
    return tensor


def _leaves(hidden: Tensor) -> bool:
    """Whether it isn't in host memory as it is."""
    return hidden.device.type != "cpu"


def _page_locked(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, pin_memory=True)


def _page_locked_bytes(size_bytes: int) -> int:
    """What is taken for so many: `c10`'s allocator of page-locked memory rounds up to powers of two
    (`aten/src/ATen/core/CachingHostAllocator.h`)."""
    return 1 << max(0, size_bytes - 1).bit_length()
