"""Trials that share a process: each with its own folder, tracker, row and failure."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from untracked import Notes, run

from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.trial import trial
from ray_peft.trial.pack import Member, run_pack

SETTINGS = [
    ({"rank": 4, "lr": 0.01}, {"seed": 1}),
    ({"rank": 8, "lr": 1e30}, {"seed": 2}),
    ({"rank": 2, "lr": 0.003, "targets": ["q_proj"]}, {"seed": 3, "train__steps": 6, "train__eval_every": 2}),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


def unheard(metrics, step):
    pass


def members_of(model, rows, folder, stop_at=None):
    def progress(metrics, step):
        if step == stop_at:
            raise KeyboardInterrupt

    specs = [
        TrialSpec.from_plain(tiny.plain_spec(model, rows, {"name": "lora", **method}, **changes))
        for method, changes in SETTINGS
    ]
    return [Member(spec, trial.Place(folder / spec.trial_id, "cpu"), Notes(), progress) for spec in specs]


def test_each_has_the_row_and_the_files_of_a_trial_alone(tiny_model, questions, tmp_path):
    members = members_of(tiny_model, questions, tmp_path / "pack")
    told = []
    rows = run_pack(members, told.append)
    assert [row.trial_id for row in rows] == [member.spec.trial_id for member in members]
    assert sorted(row.trial_id for row in told) == sorted(row.trial_id for row in rows)
    assert [row.status for row in rows] == ["finished", "failed", "finished"]
    assert "is nan at step" in rows[1].error
    assert json.loads((members[1].place.folder / trial.RESULT_FILE).read_text())["status"] == "failed"
    for member, row in list(zip(members, rows, strict=True))[::2]:
        own, tracker = run(member.spec, tmp_path / "alone" / member.spec.trial_id)
        ours, theirs = row.model_dump(), own.model_dump()
        for name, value in theirs["scores"].items():
            assert ours["scores"][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        same = ("steps", "trainable_parameters", "total_parameters", "adapter_bytes", "spec", "arithmetic", "lowered")
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert row.train_loss_final == pytest.approx(own.train_loss_final, rel=1e-4)
        assert row.usage.train_tokens == own.usage.train_tokens
        assert row.usage.train_s > 0
        assert (row.pack_size, own.pack_size) == (3, 1)
        usage = row.usage
        assert usage.wall_time_s == pytest.approx(usage.load_s + usage.train_s + usage.evaluate_s + usage.save_s)
        assert set(member.tracker.artifacts) == set(tracker.artifacts)
        files = {file.name for file in (tmp_path / "alone" / member.spec.trial_id).iterdir()}
        assert {file.name for file in member.place.folder.iterdir()} == files
        names = [
            folder / "adapter" / "adapter_model.safetensors"
            for folder in (member.place.folder, tmp_path / "alone" / member.spec.trial_id)
        ]
        weights = [load_file(name) for name in names]
        assert weights[0].keys() == weights[1].keys()
        config = [json.loads((name.parent / "adapter_config.json").read_text()) for name in names]
        assert config[0] == config[1]


def test_a_stop_records_all_as_cancelled_and_the_same_pack_goes_on(tiny_model, questions, tmp_path):
    members = members_of(tiny_model, questions, tmp_path, stop_at=3)
    members = [Member(m.spec.changed({"train.checkpoint_every": 1}), m.place, m.tracker, m.progress) for m in members]
    with pytest.raises(KeyboardInterrupt):
        run_pack(members)
    statuses = [json.loads((m.place.folder / trial.RESULT_FILE).read_text())["status"] for m in members]
    assert set(statuses) <= {"cancelled", "failed"}
    assert "cancelled" in statuses
    again = [Member(m.spec, m.place, Notes(), lambda metrics, step: None) for m in members]
    rows = run_pack(again)
    assert [row.status for row in rows] == ["finished", "failed", "finished"]
    assert [row.resumed_from_step for row in rows[::2]] == [2, 2]


@pytest.fixture
def crowded(monkeypatch):
    """Passes of more than two trials run out of memory from the fourth round on; returns the trials of each round."""
    from ray_peft.tasks.llm_sft.together import LossTogether, RowsTogether

    rounds = {}
    parts, inputs = RowsTogether.parts, LossTogether.inputs

    def seen(self, step, share, rows):
        rounds[step] = len(self._seats)
        return parts(self, step, share, rows)

    def full(self, part):
        if max(rounds) >= 3 and rounds[max(rounds)] > 2:
            rounds.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs(self, part)

    monkeypatch.setattr(RowsTogether, "parts", seen)
    monkeypatch.setattr(LossTogether, "inputs", full)
    return rounds


def test_a_pack_that_runs_out_of_memory_goes_on_as_two_from_its_checkpoints(
    tiny_model, questions, tmp_path, crowded, caplog
):
    members = members_of(tiny_model, questions, tmp_path)
    changed = {"train.checkpoint_every": 2, "method.lr": 0.01}
    members = [Member(m.spec.changed(changed), m.place, m.tracker, m.progress) for m in members]
    members.append(
        Member(members[0].spec.changed({"seed": 9}), trial.Place(tmp_path / "ninth", "cpu"), Notes(), unheard)
    )
    rows = run_pack(members)
    assert "4 trials together: OutOfMemoryError" in caplog.text
    assert [row.status for row in rows] == ["finished"] * 4
    assert [row.pack_size for row in rows] == [2] * 4
    assert [row.resumed_from_step for row in rows] == [2] * 4
    for member, row in zip(members, rows, strict=True):
        own, tracker = run(member.spec, tmp_path / "alone" / member.spec.trial_id)
        assert row.scores.eval_loss == pytest.approx(own.scores.eval_loss, rel=1e-4)
        assert row.usage.train_tokens == own.usage.train_tokens
        assert member.tracker.steps == tracker.steps


def test_what_they_share_fails_for_each_alone_as_well(tiny_model, questions, tmp_path, monkeypatch):
    from ray_peft.engine.loop import Engine

    def fall(self, number):
        raise RuntimeError("CUDA error: out of paper")

    monkeypatch.setattr(Engine, "_pass_all", fall)
    rows = run_pack(members_of(tiny_model, questions, tmp_path))
    assert [row.status for row in rows] == ["failed"] * 3
    assert all("out of paper" in row.error for row in rows)
    assert [row.pack_size for row in rows] == [1] * 3


def test_a_device_that_is_broken_leaves_the_rows_to_the_next_process(tiny_model, questions, tmp_path, monkeypatch):
    from ray_peft.engine.loop import Engine
    from ray_peft.trial import pack

    def fall(self, number):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Engine, "_pass_all", fall)
    monkeypatch.setattr(pack, "answers", lambda device: False)
    members = members_of(tiny_model, questions, tmp_path)
    with pytest.raises(TrialFailed, match="illegal memory access"):
        run_pack(members)
    assert not [m for m in members if (m.place.folder / trial.RESULT_FILE).exists()]
