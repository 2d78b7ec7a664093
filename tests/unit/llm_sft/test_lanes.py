"""Rows lie whole in lanes of few static shapes, each once."""

import random

import pytest

from ray_peft.tasks.llm_sft.lanes import Bucket, Pass, largest_capacity, lay_out, lay_out_apart, reused


@pytest.mark.parametrize("seed", range(20))
def test_every_row_lies_once_in_a_lane_that_holds_it(seed):
    draw = random.Random(seed)
    longest = draw.choice([40, 128, 300, 513, 2048])
    lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, 24))]
    largest = largest_capacity(longest)
    tokens = draw.choice([1, 4, 16]) * largest
    passes = lay_out(lengths, tokens, largest)
    assert sorted(row for part in passes for lane in part.lanes for row in lane) == list(range(len(lengths)))
    for part in passes:
        assert part.bucket.tokens <= max(tokens, largest)
        assert len(part.lanes) <= part.bucket.lanes
        assert all(sum(lengths[row] for row in lane) <= part.bucket.capacity for lane in part.lanes)


def test_short_rows_share_a_lane_and_long_ones_do_not_pay_for_them():
    (part,) = lay_out([500, 100, 120, 90, 80, 60], 8 * 512, 512)
    assert part.bucket.tokens == 1024
    assert part.lanes[0] == (0,)
    assert [one.bucket for one in lay_out([100], 8 * 2048, 2048)] == [Bucket(1, 128)]
    assert lay_out([], 512, 512) == []


def test_memory_bounds_a_pass_and_a_single_row_passes_alone():
    passes = lay_out([512, 512, 512, 512], 1024, 512)
    assert [part.bucket for part in passes] == [Bucket(2, 512)] * 2
    assert [part.bucket for part in lay_out([512], 100, 512)] == [Bucket(1, 512)]


def test_a_shape_that_was_used_serves_what_is_a_little_smaller():
    used = {Bucket(1, 512)}
    assert reused(Pass(Bucket(1, 384), ((0,),)), used, 4096).bucket == Bucket(1, 512)
    assert reused(Pass(Bucket(1, 128), ((0,),)), used, 4096).bucket == Bucket(1, 128)
    assert reused(Pass(Bucket(2, 384), ((0,), (1,))), used, 4096).bucket == Bucket(2, 384)
    assert reused(Pass(Bucket(1, 384), ((0,),)), used, 400).bucket == Bucket(1, 384), "memory is for 400 tokens"
    assert len(used) == 4


def test_no_lane_holds_rows_of_two_members():
    members = [0, 0, 0, 1, 1]
    passes = lay_out([100, 20, 5, 90, 30], 4096, 512, members)
    lanes = [{members[row] for row in lane} for part in passes for lane in part.lanes]
    assert sorted(map(len, lanes)) == [1, 1]
    assert [one.bucket for one in passes] == [Bucket(2, 128)]


def test_short_rows_of_other_members_pass_apart_from_a_long_one_where_that_pays():
    lengths = [2000] + [100] * 7
    together = lay_out(lengths, 10**6, 2048, range(8))
    assert [part.bucket for part in together] == [Bucket(8, 2048)]
    apart = lay_out_apart(lengths, 10**6, 2048, range(8))
    assert sorted((part.bucket.lanes, part.bucket.capacity) for part in apart) == [(1, 2048), (8, 128)]
    assert sorted(row for part in apart for lane in part.lanes for row in lane) == list(range(8))
    assert len(lay_out_apart([200] + [100] * 5, 10**6, 2048, range(6))) == 1, "a pass of its own costs more"
    assert lay_out_apart([], 10**6, 2048, []) == []
