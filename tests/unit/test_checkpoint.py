"""A checkpoint is whole or passed over: cut, emptied, flipped, removed or half written; and two are kept."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import zipfile

import numpy
import pytest
import torch

from ray_peft.engine import checkpoint, cost
from ray_peft.engine.checkpoint import STATE_FILE
from ray_peft.engine.due import Due
from ray_peft.engine.random_state import draw_from, random_state
from ray_peft.foundation import whole
from ray_peft.foundation.durations import seconds_of
from ray_peft.foundation.seal import SEAL_FILE, broken, seal
from ray_peft.tasks.llm_sft import trl_checkpoints


def state_of(step):
    return {
        "step": step,
        "parameters": [torch.arange(50.0) + step, torch.full((3, 3), step, dtype=torch.bfloat16)],
        "cost": {"trained": {"losses": [0.5, step]}},
    }


def same(one, other):
    tensors = zip(one["parameters"], other["parameters"], strict=True)
    return all(torch.equal(*pair) for pair in tensors) and (one["step"], one["cost"]) == (other["step"], other["cost"])


@pytest.fixture
def folder(tmp_path):
    """With the checkpoints of steps 2 and 10."""
    for step in (2, 10):
        checkpoint.write(tmp_path, step, state_of(step))
    return tmp_path


def test_two_are_kept_and_what_is_later_or_half_written_goes(folder):
    (folder / ".checkpoint-11.partial").mkdir()
    (folder / "checkpoint-half").mkdir()
    checkpoint.write(folder, 12, state_of(12))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    checkpoint.write(folder, 11, state_of(11))  # 12 was damaged, so the trial went on from 10
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    where, state = checkpoint.read_last(folder)
    assert where.name == "checkpoint-11"
    assert same(state, state_of(11))


@pytest.mark.parametrize("damage", ["cut", "halved", "emptied", "flipped", "removed", "folder emptied"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(folder, damage, caplog):
    file = folder / "checkpoint-10" / STATE_FILE
    content = bytearray(file.read_bytes())
    if damage == "flipped":  # in the numbers of the first weight
        content[content.index(torch.arange(50.0).add(10).numpy().tobytes()) + 90] ^= 1
        file.write_bytes(content)
    elif damage == "removed":
        shutil.rmtree(file.parent)
    elif damage == "folder emptied":
        file.unlink()
    else:
        file.write_bytes(content[: {"cut": -40, "halved": len(content) // 2, "emptied": 0}[damage]])
    with caplog.at_level(logging.WARNING):
        where, state = checkpoint.read_last(folder)
    assert where.name == "checkpoint-2"
    assert same(state, state_of(2))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (damage != "removed")
    assert all("checkpoint-10 is not whole, and is passed over: " in text and "\n" not in text for text in warnings)


def test_torch_itself_takes_a_flipped_bit_for_good(folder):
    """Why the checksums are looked at here: should torch do so some day, this is no longer needed."""
    content = bytearray((folder / "checkpoint-10" / STATE_FILE).read_bytes())
    content[content.index(torch.arange(50.0).add(10).numpy().tobytes()) + 90] ^= 1
    assert not same(torch.load(io.BytesIO(content), weights_only=True), state_of(10))


def test_no_flipped_bit_gives_other_numbers(folder):
    """Every 5th byte, and all of the archive's directory: what is taken up is what was written."""
    file = folder / "checkpoint-10" / STATE_FILE
    content = file.read_bytes()
    directory = zipfile.ZipFile(file).start_dir
    dice = random.Random(0)
    outcomes = {"whole": 0, "passed over": 0}
    for place in [*range(0, directory, 5), *range(directory, len(content))]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        where, state = checkpoint.read_last(folder)
        assert same(state, state_of(int(where.name.removeprefix("checkpoint-")))), f"byte {place}"
        outcomes["whole" if where.name == "checkpoint-10" else "passed over"] += 1  # padding counts for nothing
    assert min(outcomes.values()) > 100


def test_without_a_whole_one_the_stage_starts_anew_with_a_warning(folder, caplog):
    for path in folder.iterdir():
        (path / STATE_FILE).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.read_last(folder) is None
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records][-1] == (
        "no checkpoint is whole, so the stage starts anew"
    )
    assert len(caplog.records) == 3
    caplog.clear()
    assert checkpoint.read_last(folder / "gone") is None
    assert not caplog.records


@pytest.mark.parametrize("moment", ["saving", "flushing", "moving"])
def test_what_fails_in_the_middle_leaves_the_one_before_and_no_half(folder, monkeypatch, moment):
    def refuse(*given, **named):
        raise OSError(28, "No space left on device")

    if moment == "saving":
        monkeypatch.setattr(checkpoint._Whole, "write", refuse)
    elif moment == "flushing":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(whole.os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(folder, 12, state_of(12))
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert same(checkpoint.read_last(folder)[1], state_of(10))


def test_all_random_numbers_go_on_where_they_were():
    def drawn():
        return (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(3).tolist())

    random.gauss(0, 1)  # so that Python keeps the second one of a pair
    numpy.random.normal()  # as NumPy does
    buffer = io.BytesIO()
    torch.save(random_state("cpu"), buffer)
    first = drawn()
    buffer.seek(0)
    draw_from(torch.load(buffer, weights_only=True), "cpu")
    assert drawn() == first


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "removed"])
@pytest.mark.parametrize("name", ["inner/weights.bin", "notes.json", SEAL_FILE])
def test_a_seal_tells_every_damage(tmp_path, name, damage):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "notes.json").write_text('{"steps": 4}')
    assert "cannot be read" in broken(tmp_path)
    seal(tmp_path)
    (tmp_path / "later").touch()
    assert broken(tmp_path) is None
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "emptied": b"", "flipped": content}[damage])
    assert broken(tmp_path) is not None


def test_half_of_a_stock_checkpoint_is_not_gone_on_from(tmp_path, caplog):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step"' + ": 2}" * (step == 2))
    assert trl_checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"  # as version 0.1.0 left it
    cost.write(tmp_path / "checkpoint-10", {"trained": {}, "trial": {}})
    assert trl_checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"
    seal(tmp_path / "checkpoint-10")
    assert trl_checkpoints.last_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / cost.COST_FILE).write_text(json.dumps({"trained": {}, "trial": [1]}))
    caplog.clear()
    assert trl_checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"
    assert "checkpoint-10 is not whole, and is passed over: cost.json has" in caplog.text
    assert trl_checkpoints.last_checkpoint(tmp_path / "gone") is None


class Clock:
    """Stands for the time module, so that minutes take no time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ray_peft.engine.due.time", clock)
    return clock


def test_a_checkpoint_is_due_after_steps():
    due = Due(3)
    assert [step for step in range(1, 10) if due.after(step, 9, logged=False)] == [3, 6]
    assert not any(Due(None).after(step, 9, logged=True) for step in range(1, 10))


def test_a_checkpoint_is_due_after_a_time(clock):
    due, written = Due("1 minute"), []
    for step in range(1, 31):
        clock.now += 25
        if due.after(step, 30, logged=False):
            written.append(step)
            clock.now += 5 if step > 10 else 1
            assert due.written() == (5 if step > 10 else 1)
    # Every 75 seconds; after one that took 5 s, not before 100 seconds.
    assert written == [3, 6, 9, 12, 16, 20, 24, 28]


def test_the_end_of_a_stage_is_kept_if_it_took_a_minute(clock):
    assert [Due("5 minutes").after(9, 9, logged=True)] == [False]
    due = Due("5 minutes")
    clock.now += 60
    assert not due.after(8, 9, logged=True)
    assert due.after(9, 9, logged=True)
    assert not Due(3).after(9, 9, logged=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5 minutes", 300), ("90s", 90), ("1.5 hours", 5400), ("1 MINUTE", 60), (" 2 min ", 120), ("1 h", 3600)],
)
def test_times_in_words(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "minutes", "0 s", "-3 s", "5 parsecs", "1 minute 30 s", "nan s"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is no time; write one such as 5 minutes, 90 seconds or 1.5 hours"):
        seconds_of(text)
