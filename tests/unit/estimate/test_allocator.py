"""The replayed allocator against sizes worked out by hand from CUDACachingAllocator.cpp."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.engine.memory.allocator import CachingAllocator, OutOfCard
from lora_cli.engine.memory.expandable import VARIABLES, ExpandableAllocator, asked_for

KIB, MIB = 2**10, 2**20


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # less than 1 MiB would remain: not split, and counted as a whole
    ],
)
def test_one_request_is_rounded_and_takes_a_segment(size: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_small_requests_share_a_segment() -> None:
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.allocate(512)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    wide, narrow = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
    allocator.free(wide)
    allocator.free(narrow)
    assert allocator.allocate(29 * MIB) == narrow
    assert allocator.allocate(33 * MIB) == wide
    assert allocator.reserved_bytes == 70 * MIB


def test_neighbours_merge_when_both_are_free() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(40 * MIB)
    allocator.free(whole)
    halves = [allocator.allocate(20 * MIB), allocator.allocate(20 * MIB)]
    for half in halves:
        allocator.free(half)
    assert allocator.allocate(40 * MIB) == whole
    assert allocator.reserved_bytes == 40 * MIB


def test_a_hole_between_blocks_in_use_is_fragmentation() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(60 * MIB))
    parts = [allocator.allocate(20 * MIB) for _ in range(3)]
    allocator.free(parts[0])
    allocator.free(parts[2])
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 90 * MIB


def test_a_full_card_gives_back_what_is_cached_and_then_gives_up() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    allocator.allocate(80 * MIB)
    assert allocator.reserved_bytes == 80 * MIB
    with pytest.raises(OutOfCard):
        allocator.allocate(30 * MIB)


def test_emptying_the_cache_leaves_segments_in_use() -> None:
    allocator = CachingAllocator()
    kept = allocator.allocate(12 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    assert allocator.empty_cache() == 30 * MIB
    assert allocator.reserved_bytes == 12 * MIB
    allocator.free(kept)
    assert allocator.allocated_bytes == 0


def test_expandable_segments_grow_and_leave_no_holes_behind() -> None:
    fixed, expandable = CachingAllocator(), ExpandableAllocator()
    for allocator in (fixed, expandable):
        for size in (30, 60, 120, 240):
            allocator.free(allocator.allocate(size * MIB))
    assert fixed.reserved_bytes == (30 + 60 + 120 + 240) * MIB
    assert expandable.reserved_bytes == 240 * MIB


requests = st.lists(st.tuples(st.integers(1, 64 * MIB), st.booleans()), min_size=1, max_size=60)


@given(requests, st.booleans())
def test_blocks_never_overlap_and_nothing_is_lost(sizes: list[tuple[int, bool]], expandable: bool) -> None:
    allocator = (ExpandableAllocator if expandable else CachingAllocator)()
    alive: dict[int, int] = {}
    for size, free_oldest in sizes:
        address = allocator.allocate(size)
        assert all(address + size <= other or other + extent <= address for other, extent in alive.items())
        alive[address] = size
        if free_oldest:
            oldest = next(iter(alive))
            allocator.free(oldest)
            del alive[oldest]
        assert sum(alive.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
    for address in alive:
        allocator.free(address)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.peak_reserved_bytes >= allocator.peak_allocated_bytes


def test_of_two_equal_blocks_the_later_large_segment_is_taken_first() -> None:
    """The driver gives large segments falling addresses, and the allocator prefers the lowest."""
    allocator = CachingAllocator()
    first, second = allocator.allocate(40 * MIB), allocator.allocate(40 * MIB)
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(40 * MIB) == second
    buffers = [allocator.allocate(9 * MIB) for _ in range(4)]
    assert buffers == sorted(buffers)


def test_what_can_still_grow_is_left_for_larger_requests() -> None:
    """Of two free blocks, a hole in the middle is taken before the end of the range, though that is the tighter fit."""
    allocator = ExpandableAllocator()
    wide, wall, last = (allocator.allocate(size * MIB) for size in (60, 20, 40))
    allocator.free(wide)
    allocator.free(last)
    assert allocator.allocate(40 * MIB) == wide
    assert wall < last


def test_pages_within_free_blocks_go_when_the_cache_is_emptied_and_come_back_where_they_were() -> None:
    allocator = ExpandableAllocator()
    first, middle, last = (allocator.allocate(size * MIB) for size in (30, 70, 20))
    allocator.free(middle)  # from 30 to 100 MiB, in which the pages from 40 to 100 are whole
    assert allocator.empty_cache() == 60 * MIB
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.allocate(45 * MIB) == middle  # 10 MiB that stayed and 35 in two pages
    assert allocator.reserved_bytes == 100 * MIB
    for address in (first, middle, last):
        allocator.free(address)
    assert allocator.empty_cache() == 100 * MIB
    assert allocator.allocate(120 * MIB) == first


def test_a_full_card_under_expandable_segments() -> None:
    allocator = ExpandableAllocator(capacity_bytes=100 * MIB)
    allocator.allocate(2 * MIB)
    allocator.free(allocator.allocate(75 * MIB))
    small = [allocator.allocate(MIB) for _ in range(20)]  # 20 MiB of the other pool: the first one's cache has to go
    assert allocator.reserved_bytes == 100 * MIB
    small.append(allocator.allocate(MIB))
    assert allocator.reserved_bytes == (20 + 22) * MIB
    with pytest.raises(OutOfCard):
        allocator.allocate(79 * MIB)
    assert allocator.allocated_bytes == 23 * MIB


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True,expandable_segments:False"}, False),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, False),
    ],
)
def test_what_an_environment_asks_for(environment: dict[str, str], answer: bool) -> None:
    assert asked_for(environment) is answer


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="older PyTorch doesn't tell")
def test_pytorch_reads_the_same_variable_first() -> None:
    both = {name: f"max_split_size_mb:{number}" for number, name in enumerate(VARIABLES, start=64)}
    code = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **both}, capture_output=True, text=True
    )
    assert done.stdout.strip() == both[VARIABLES[0]]
