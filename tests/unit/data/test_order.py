"""The order of examples."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.order import epoch_order, splitmix64, step_examples, steps_per_epoch


def test_splitmix64_is_the_published_generator() -> None:
    """Its first outputs for seed 1234567, as Rosetta Code and the authors' C code give them."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * step) % 2**64 for step in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_golden_orders() -> None:
    """A changed order would silently change every run and break every resume."""
    assert epoch_order(42, 0, 10).tolist() == [9, 4, 0, 3, 5, 1, 6, 2, 7, 8]
    assert epoch_order(42, 1, 10).tolist() == [1, 0, 3, 5, 4, 6, 2, 9, 8, 7]
    assert epoch_order(0, 0, 5).tolist() == [2, 3, 0, 4, 1]


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(0, 300))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_place_is_as_likely_for_every_example() -> None:
    """A biased shuffle would show as an example that comes early too often: mean place within 5 sigma."""
    places = np.array([np.argsort(epoch_order(seed, 0, 10)) for seed in range(2000)])
    sigma = np.sqrt((10**2 - 1) / 12 / 2000)
    assert np.all(np.abs(places.mean(axis=0) - 4.5) < 5 * sigma)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_the_steps_of_an_epoch_are_its_order_cut_up(count: int, batch_size: int, epoch: int) -> None:
    per_epoch = steps_per_epoch(count, batch_size)
    first = epoch * per_epoch + 1
    steps = [
        step_examples(step, seed=7, count=count, batch_size=batch_size) for step in range(first, first + per_epoch)
    ]
    assert np.concatenate(steps).tolist() == epoch_order(7, epoch, count).tolist()
    assert all(len(step) == batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size


def test_a_shared_order_can_not_be_changed() -> None:
    assert not epoch_order(1, 1, 5).flags.writeable
