"""Segments worked out by hand, and against what was measured on a GPU."""

from __future__ import annotations

import random

from ray_peft.foundation.units import MIB
from ray_peft.vram.pool import Pool


def test_small_middle_and_large_tensors_get_segments_of_their_kind():
    pool = Pool()
    pool.allocate(512)
    pool.allocate(MIB)
    assert pool.reserved == 2 * MIB, "both in one"
    pool.allocate(MIB + 512)
    pool.allocate(9 * MIB)
    assert pool.reserved == (2 + 20) * MIB
    pool.allocate(11 * MIB - 512)
    assert pool.reserved == (2 + 20 + 12) * MIB


def test_a_freed_block_is_cut_and_what_is_left_serves_the_next():
    pool = Pool()
    large = pool.allocate(100 * MIB)
    pool.free(large)
    parts = [pool.allocate(30 * MIB) for _ in range(3)]
    assert pool.reserved == 100 * MIB
    pool.allocate(10 * MIB)
    assert pool.reserved == 100 * MIB
    pool.allocate(2 * MIB)
    assert pool.reserved == 120 * MIB
    for part in parts:
        pool.free(part)
    pool.allocate(90 * MIB)
    assert pool.reserved == 120 * MIB, "neighbours were joined"


def test_free_parts_of_two_segments_do_not_serve_one_tensor():
    pool = Pool()
    blocks = [pool.allocate(60 * MIB) for _ in range(2)]
    for block in blocks:
        pool.free(block)
    pool.allocate(100 * MIB)
    assert pool.reserved == 220 * MIB


def test_no_two_blocks_overlap_and_all_is_joined_in_the_end():
    draw, pool, taken = random.Random(0), Pool(), []
    for _ in range(3000):
        if taken and draw.random() < 0.5:
            pool.free(taken.pop(draw.randrange(len(taken))))
        else:
            taken.append(pool.allocate(512 * draw.choice([1, 7, 3000, 9000, 50_000])))
        ends = sorted((block.address, block.address + block.size) for block in taken)
        assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    reserved = pool.reserved
    for block in taken:
        pool.free(block)
    assert sum(size for sizes in pool._free.values() for size, _, _ in sizes) == reserved
    assert all(block.before is block.after is None for blocks in pool._free.values() for *_, block in blocks)
