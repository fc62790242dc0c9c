"""CUDA's caching allocator, replayed: how much a stream of births and deaths reserves of the card.

After `c10/cuda/CUDACachingAllocator.cpp` of PyTorch 2.13 with its default settings, one stream, no graphs. Sizes are
rounded to 512 bytes. Up to 1 MiB comes from the small pool, in segments of 2 MiB; the rest from the large pool, in
segments of 20 MiB, or from 10 MiB on in segments of its own size rounded up to 2 MiB. The best fit is the smallest free
block that is large enough, the lowest address among equals; it is split if what remains is worth keeping. Neighbours
that are both free merge. Which of two segments lies lower is the driver's choice, of which nothing is published: see
`rising_below`. When the card is full, cached segments that are free as a whole are given back, and the request is tried
once more. `expandable` has the allocator under `expandable_segments`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIN_BLOCK = 512
SMALL_SIZE = 2**20
SMALL_BUFFER = 2 * 2**20
LARGE_BUFFER = 20 * 2**20
MIN_LARGE_ALLOC = 10 * 2**20
ROUND_LARGE = 2 * 2**20

_SEGMENT_GAP = 2**44
"""Segments lie this far apart in the replay's address space, so that they never touch."""
_FIRST_ADDRESS = 2**63
_RISING_BELOW = {(7, 5): 32 * 2**20}
"""On a Tesla T4, CUDA 12.8 and 13.0: inferred from reserved memory in published runs (fitcheck 0.3.1)."""


def rising_below(capability: tuple[int, int]) -> int:
    """Segments smaller than this many bytes get rising addresses on a card, larger ones falling ones.

    None do on an H200 under driver 580, inferred likewise: so 36 of 50 runs there are replayed to the byte, and in no
    other order as many (docs/measurements/memory-nvidia-h200.json). Other cards are taken to be like it.
    """
    return _RISING_BELOW.get(capability, 0)


class OutOfCard(Exception):
    """The card is smaller than what is asked for, even with nothing cached."""


@dataclass(slots=True)
class Block:
    address: int
    size: int
    small: bool
    free: bool
    previous: Block | None = None
    next: Block | None = None
    mapped: bool = True
    """False is a range of addresses with no memory behind it."""


class CachingAllocator:
    """One card's allocator; `rising_below` as the function of this name gives it."""

    def __init__(self, capacity_bytes: int | None = None, *, rising_below: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self._rising_below = rising_below
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self._segments = 0
        # Free blocks of each pool, sorted by size, then address.
        self._pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}

    def allocate(self, size_bytes: int) -> int:
        """The address of a new block; 0 for an empty one.

        Raises:
            OutOfCard: the capacity doesn't hold it.
        """
        if size_bytes == 0:
            return 0
        size = max(MIN_BLOCK, -(-size_bytes // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL_SIZE
        block = self._best_fit(size, small) or self._new_segment(size, small)
        block.free = False
        if self._worth_splitting(block, size):
            self._split(block, size)
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block.address

    def free(self, address: int) -> None:
        if address == 0:
            return
        block = self._blocks[address]
        self.allocated_bytes -= block.size
        block.free = True
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free:
                self._remove(neighbour)
                block = self._merge(block, neighbour)
        insort(self._pools[block.small], (block.size, block.address))

    def empty_cache(self) -> int:
        """Give back what no block uses; the bytes given back."""
        before = self.reserved_bytes
        for small, pool in self._pools.items():
            for size, address in list(pool):
                block = self._blocks[address]
                if block.previous is None and block.next is None:
                    pool.remove((size, address))
                    del self._blocks[address]
                    self.reserved_bytes -= size
            assert all(self._blocks[address].small is small for _, address in pool)
        return before - self.reserved_bytes

    def reset_peaks(self) -> None:
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._pools[small]
        index = bisect_left(pool, (size, 0))
        if index == len(pool):
            return None
        _, address = pool.pop(index)
        return self._blocks[address]

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_BUFFER
        elif size < MIN_LARGE_ALLOC:
            segment = LARGE_BUFFER
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(segment)
        self._segments += 1
        apart = self._segments * _SEGMENT_GAP
        address = _FIRST_ADDRESS + (apart if segment < self._rising_below else -apart)
        block = Block(address, segment, small, free=False)
        self._blocks[block.address] = block
        return block

    def _reserve(self, segment: int) -> None:
        if self.capacity_bytes is not None and self.reserved_bytes + segment > self.capacity_bytes:
            self.empty_cache()
            if self.reserved_bytes + segment > self.capacity_bytes:
                raise OutOfCard
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _worth_splitting(self, block: Block, size: int) -> bool:
        remaining = block.size - size
        if block.small:
            return remaining >= MIN_BLOCK
        return remaining > SMALL_SIZE

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, True, previous=block, next=block.next)
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = size
        self._blocks[rest.address] = rest
        insort(self._pools[block.small], (rest.size, rest.address))

    def _merge(self, one: Block, other: Block) -> Block:
        first, second = (one, other) if one.address < other.address else (other, one)
        first.size += second.size
        first.next = second.next
        if second.next is not None:
            second.next.previous = first
        first.free = True
        del self._blocks[second.address]
        return first

    def _remove(self, block: Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
