"""The caching allocator under `expandable_segments`: two ranges of addresses, behind which pages are mapped as needed.

After `find_expandable_block`, `map_block`, `unmap_block` and `get_free_block` of `CUDACachingAllocator.cpp`. Each pool
is one range, without end for all purposes, and grows by pages of 2 MiB (small) or 20 MiB (large), at the lowest hole
that is large enough, a free block before the hole included. Emptying the cache takes away the whole pages within free
blocks, in the middle of the range too. How a process asks for it: `asked_for`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

from lora_cli.engine.memory.allocator import (
    LARGE_BUFFER,
    MIN_BLOCK,
    SMALL_BUFFER,
    Block,
    CachingAllocator,
    OutOfCard,
)

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""PyTorch reads the second where the first isn't set."""
_KEY = "expandable_segments"

_RANGE = LARGE_BUFFER * 2**24


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether PyTorch, started in this environment, takes expandable segments."""
    settings = next((environment[name] for name in VARIABLES if name in environment), "")
    values = [value for key, _, value in (part.partition(":") for part in settings.split(",")) if key.strip() == _KEY]
    return bool(values) and values[-1].strip() == "True"


class ExpandableAllocator(CachingAllocator):
    """One card's allocator."""

    def __init__(self, capacity_bytes: int | None = None, *, rising_below: int = 0) -> None:
        super().__init__(capacity_bytes, rising_below=rising_below)
        self._holes: dict[bool, list[int]] = {}
        for small, start in ((True, _RANGE), (False, 2 * _RANGE)):
            self._blocks[start] = Block(start, _RANGE, small, free=False, mapped=False)
            self._holes[small] = [start]

    def empty_cache(self) -> int:
        """Give back the whole pages within free blocks; the bytes given back."""
        before = self.reserved_bytes
        for pool in self._pools.values():
            for _, address in list(pool):
                self._unmap(self._blocks[address])
        return before - self.reserved_bytes

    def _best_fit(self, size: int, small: bool) -> Block | None:
        """A block that could grow counts as large as it could become."""
        pool = self._pools[small]
        index = bisect_left(pool, (size, 0))
        if index == len(pool):
            return None
        while index + 1 < len(pool) and self._room(pool[index + 1]) < self._room(pool[index]):
            index += 1
        return self._blocks[pool.pop(index)[1]]

    def _room(self, entry: tuple[int, int]) -> int:
        size, address = entry
        after = self._blocks[address].next
        return size + (after.size if after is not None and not after.mapped else 0)

    def _new_segment(self, size: int, small: bool) -> Block:
        start, missing = self._lowest(size, small)
        if self.capacity_bytes is not None and self.reserved_bytes + missing > self.capacity_bytes:
            self.empty_cache()
            start, missing = self._lowest(size, small)
            if self.reserved_bytes + missing > self.capacity_bytes:
                raise OutOfCard
        block = start if start.mapped else self._map(start, size)
        while block.size < size:
            assert block.next is not None
            block = self._map(block.next, size - block.size)
        self._remove(block)
        return block

    def _lowest(self, size: int, small: bool) -> tuple[Block, int]:
        """The first of the blocks at the lowest address where `size` fits, and the bytes to map there."""
        for address in self._holes[small]:
            first = self._blocks[address]
            if first.previous is not None and first.previous.free:
                first = first.previous
            found, missing, block = 0, 0, first
            while found < size:
                if not block.mapped:
                    missing += min(block.size, _pages(size - found, small))
                found += block.size
                if block.next is None or not (block.next.free or not block.next.mapped):
                    break
                block = block.next
            if found >= size:
                return first, missing
        raise AssertionError("the last hole has no end")

    def _map(self, hole: Block, size: int) -> Block:
        """Put pages behind the first `size` bytes of a hole, or all of it; the free block that they become."""
        pages = min(hole.size, _pages(size, hole.small))
        self._reserve(pages)
        self._holes[hole.small].remove(hole.address)
        if pages < hole.size:
            self._cut(hole, pages, mapped=False)
        hole.mapped, hole.free, block = True, True, hole
        for neighbour in (hole.previous, hole.next):
            if neighbour is not None and neighbour.free:
                self._remove(neighbour)
                block = self._merge(block, neighbour)
        insort(self._pools[block.small], (block.size, block.address))
        return block

    def _unmap(self, block: Block) -> None:
        page = _page(block.small)
        begin = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if begin >= end:
            return
        self._remove(block)
        if end < block.address + block.size:
            self._cut(block, end - block.address, mapped=True)
        if begin > block.address:
            front, block = block, self._cut(block, begin - block.address, mapped=True, pooled=False)
            insort(self._pools[front.small], (front.size, front.address))
        self.reserved_bytes -= block.size
        block.mapped = block.free = False
        hole = block
        for neighbour in (block.previous, block.next):
            if neighbour is not None and not neighbour.mapped:
                self._holes[block.small].remove(neighbour.address)
                hole = self._merge(hole, neighbour)
                hole.free = False
        insort(self._holes[hole.small], hole.address)

    def _cut(self, block: Block, size: int, *, mapped: bool, pooled: bool = True) -> Block:
        """Shorten a block to `size`; the rest, free if it is mapped and a hole if not."""
        rest = Block(block.address + size, block.size - size, block.small, mapped, block, block.next, mapped)
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size = rest, size
        self._blocks[rest.address] = rest
        if not mapped:
            insort(self._holes[rest.small], rest.address)
        elif pooled:
            insort(self._pools[rest.small], (rest.size, rest.address))
        return rest

    def _worth_splitting(self, block: Block, size: int) -> bool:
        return block.size - size >= MIN_BLOCK


def _page(small: bool) -> int:
    return SMALL_BUFFER if small else LARGE_BUFFER


def _pages(size: int, small: bool) -> int:
    return -(-size // _page(small)) * _page(small)
