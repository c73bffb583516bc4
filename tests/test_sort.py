"""Rows in the order of their experts: by counting for few, by a sort for many; against Python's, which is stable."""

import pytest
import torch

from moe_lab.counting import sort
from moe_lab.seeding import generator


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("size", [2, 9, 16, 17, 40])
def test_rows_sorted_by_key(rows: int, size: int) -> None:
    key_N = torch.randint(size - 1, (rows,), generator=generator("keys"))  # the last key never occurs
    order_N, inverse_N, counts_X = sort(key_N, size)
    keys = key_N.tolist()
    assert order_N.tolist() == sorted(range(rows), key=lambda row: keys[row])
    assert order_N[inverse_N].tolist() == list(range(rows))
    assert counts_X.tolist() == [keys.count(x) for x in range(size)]
    assert {t.dtype for t in (order_N, inverse_N, counts_X)} == {torch.int64}
