"""The pool of decoding rows: what a row holds stays with it, and little memory stands ready for nobody."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service import cache
from gpu_service.cache import Geometry, Pool, RowCache, Slot

TINY = Geometry(n_layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def marked(mark: float, length: int) -> RowCache:
    row = RowCache(TINY, length)
    for block in (*row.keys, *row.values):
        block[:] = mark
    row.length = length
    return row


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_keep_what_is_theirs_and_few_places_stand_ready(data: st.DataObject) -> None:
    """Random joining, leaving and writing past the end of a class."""
    pool = Pool(TINY)
    rows: dict[Slot, float] = {}
    for mark in range(1, data.draw(st.integers(1, 60))):
        if rows and data.draw(st.sampled_from([False, True])):
            leaving = data.draw(st.sampled_from(list(rows)))
            kept = pool.leave(leaving, keep=True)
            assert kept
            assert all(bool((block == rows[leaving]).all()) for block in (*kept.keys, *kept.values))
            del rows[leaving]
        else:
            rows[pool.join(marked(mark, data.draw(st.sampled_from([3, 250, 254, 600]))))] = mark
        if rows and data.draw(st.sampled_from([False, True])):
            decoding = pool.decoding()
            new = torch.tensor([[[[rows[slot]] * 2]] for slot in pool.order()], dtype=torch.float32)  # (B, G, 1, Dh)
            for layer in range(TINY.n_layers):
                decoding.attend(layer, new, new, new)
        for size in pool._classes.values():
            idle = size.slots - len(size.members)
            assert 0 <= idle * TINY.row_bytes(size.capacity) <= cache.READY_BYTES
    for slot, held in list(rows.items()):
        kept = pool.leave(slot, keep=True)
        assert kept
        assert all(bool((block == held).all()) for block in (*kept.keys, *kept.values))
    assert pool.n_bytes == 0


def test_where_a_row_is_large_one_place_stands_ready_at_most() -> None:
    wide = Geometry(n_layers=1, kv_heads=1, head_dim=2**15, dtype=torch.float32, device=torch.device("cpu"))
    assert wide.row_bytes(1) == cache.READY_BYTES
    pool, row = Pool(wide), RowCache(wide, 1)
    row.length = 1
    slots = [pool.join(row) for _ in range(3)]
    assert pool.n_bytes <= 4 * wide.row_bytes(1)
    for slot in slots[1:]:
        pool.leave(slot, keep=False)
    assert pool.n_bytes <= 3 * wide.row_bytes(1), "and what more is idle is given back"
