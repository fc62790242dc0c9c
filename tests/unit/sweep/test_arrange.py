from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_cli.sweep.arrange import Seat, Wish, arrange


@st.composite
def wishes(draw):
    data = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=3))
    found = []
    for member in range(draw(st.integers(1, 9))):
        number = draw(st.integers(0, len(data) - 1))
        lengths = data[number]
        rows = draw(st.permutations(range(len(lengths))))[: draw(st.integers(1, len(lengths)))]
        found.append(Wish(member, tuple(rows), tuple(lengths[row] for row in rows), number))
    return found


@given(wishes(), st.integers(1, 200), st.booleans())
def test_each_row_of_each_member_comes_once_and_within_the_bound(given_wishes, tokens, alone):
    lengths = {(w.member, row): n for w in given_wishes for row, n in zip(w.rows, w.lengths, strict=True)}
    found = arrange(given_wishes, tokens, alone=alone)
    seen = [(seat.member, row) for batch in found for seat in batch for row in seat.rows]
    assert sorted(seen) == sorted(lengths)
    for batch in found:
        rows = [(seat.member, row) for seat in batch for row in seat.rows]
        assert sum(lengths[each] for each in rows) <= tokens or len(rows) == 1
        assert len({seat.member for seat in batch}) == len(batch)
        assert not alone or len(rows) == 1


def test_members_that_see_the_same_rows_sit_side_by_side():
    same = [Wish(member, (3, 5), (10, 20), "data") for member in range(4)]
    (batch,) = arrange(same, 1000)
    assert batch == tuple(Seat(member, (3, 5)) for member in range(4))
