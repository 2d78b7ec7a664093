"""Trials that share a process: each with its own folder, tracker, row and failure."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from packs import specs_of
from safetensors.torch import load_file
from untracked import Notes, run

from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.trial import trial
from ray_peft.trial.live import STOP_FILE
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


def losses_of(folder):
    """The training losses of a trial, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def judged_by(folder, word):
    """What a sweep's driver does at once: `word` ends a trial after its evaluation in step 2."""

    def verdict(step):
        if step == 2:
            (folder / STOP_FILE).write_text(word, encoding="utf-8")

    return verdict


def test_a_member_that_a_search_ends_leaves_alone_with_the_row_of_a_trial_alone(tiny_model, questions, tmp_path):
    settings = [({"rank": rank, "lr": 0.01}, {"train__eval_every": 2, "train__steps": 6}) for rank in (2, 4, 8)]

    def members(folder):
        specs = specs_of(tiny_model, questions, settings)
        return [Member(spec, trial.Place(folder / spec.trial_id, "cpu"), Notes(), unheard) for spec in specs]

    undisturbed = run_pack(members(tmp_path / "all"))
    pack = members(tmp_path / "pack")
    word = "stopped after step 2: others are better"
    pack[1] = replace(pack[1], verdict=judged_by(pack[1].place.folder, word))
    rows = run_pack(pack)
    assert [row.status for row in rows] == ["finished", "stopped_early", "finished"]
    folder = tmp_path / "alone"
    tell = judged_by(folder, word)

    def progress(metrics, step):
        if "eval_loss" in metrics:
            tell(step)

    own = trial.run(pack[1].spec, trial.Place(folder, "cpu"), Notes(), progress)
    assert (own.status, own.error, own.steps) == ("stopped_early", word, 2)
    same = ("status", "error", "steps", "spec", "trainable_parameters", "scores")
    assert {name: getattr(rows[1], name) for name in same} == {name: getattr(own, name) for name in same}
    assert rows[1].usage.train_tokens == own.usage.train_tokens > 0
    assert rows[1].train_loss_final == pytest.approx(own.train_loss_final, rel=1e-5)
    assert rows[1].eval_loss_best == pytest.approx(own.eval_loss_best, rel=1e-5)
    assert pack[1].tracker.rows == [rows[1]]
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in pack[1].place.folder.iterdir()} == files
    assert not [name for name in files if name.startswith("stage")]  # no checkpoint is left
    for place in (0, 2):  # the passes close up, so sums are rounded otherwise
        assert rows[place].scores.eval_loss == pytest.approx(undisturbed[place].scores.eval_loss, rel=1e-5)
        losses = [losses_of(tmp_path / name / rows[place].trial_id) for name in ("all", "pack")]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[1][:2] == losses[0][:2]


def test_a_further_trial_takes_the_place_of_one_that_ends_before_others(tiny_model, questions, tmp_path):
    settings = [({"rank": 4, "lr": 0.01}, {"seed": seed, "train__steps": steps}) for seed, steps in ((1, 8), (2, 2))]
    settings += [({"rank": 2, "lr": 0.02}, {"seed": 3, "train__steps": 4}), ({"rank": 16}, {"seed": 4})]
    specs = specs_of(tiny_model, questions, settings)
    members = [Member(spec, trial.Place(tmp_path / spec.trial_id, "cpu"), Notes(), unheard) for spec in specs]
    waiting, told = members[2:], []
    rows = run_pack(members[:2], told.append, lambda: waiting.pop(0) if waiting else None)
    assert [row.status for row in rows] == ["finished"] * 4
    assert [row.pack_size for row in rows] == [2, 2, 2, 1]  # no place is large enough for the last one's rank
    assert waiting == []
    for member, row in zip(members[2:], rows[2:], strict=True):
        own, tracker = run(member.spec, tmp_path / "alone" / member.spec.trial_id)
        assert row.scores.eval_loss == pytest.approx(own.scores.eval_loss, rel=1e-5)
        assert member.tracker.steps == tracker.steps
        ours, theirs = (losses_of(folder / row.trial_id) for folder in (tmp_path, tmp_path / "alone"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert (row.steps, row.usage.train_tokens) == (own.steps, own.usage.train_tokens)


def test_nobody_follows_those_that_end_together(tiny_model, questions, tmp_path):
    specs = specs_of(tiny_model, questions, [({"rank": rank}, {"train__steps": 2}) for rank in (2, 4)])
    members = [Member(spec, trial.Place(tmp_path / spec.trial_id, "cpu"), Notes(), unheard) for spec in specs]
    rows = run_pack(members, further=lambda: pytest.fail("a pack that ends asks for no further trial"))
    assert [row.status for row in rows] == ["finished"] * 2
