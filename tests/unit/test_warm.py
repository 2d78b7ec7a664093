"""A warm start: which trials can start from another's weights, that they do, and that they are compared with none."""

from __future__ import annotations

import pytest
import tiny
import torch
from answered import POOR, REFERENCES, material
from answered import trial as row_of
from safetensors.torch import load_file
from tracked import result_of, spec_of
from untracked import HYBRID, Notes, run

from ray_peft.compare.rungs import best
from ray_peft.errors import DataError, SearchSpaceError
from ray_peft.metrics.scores import Scores
from ray_peft.report.table import rows
from ray_peft.space import read
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking import Store, TrialTracker
from ray_peft.tasks.llm_sft.packable import why_alone
from ray_peft.trial import trial, warm

ORIGIN = {"trial": "lora-1a2b3c4d", "step": 2}


@pytest.fixture
def specs(tiny_model, questions):
    """Trials of a number of steps at one learning rate, so that two steps are the first half of four."""

    def of(steps, **changes):
        more = {"train__steps": steps, "train__checkpoint_every": 2, "train__schedule": "constant"}
        more |= {"train__save_dtype": "float32", "evaluation__generate": False}
        return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **(more | changes)))

    return of


def weights_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_trial_starts_from_a_checkpoint_or_from_what_was_saved(specs, tmp_path):
    run(specs(2), tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        run(specs(4), tmp_path / "four", stop_at=3)
    still = {"method": {"name": "lora", "rank": 4, "lr": 1e-30}, "train__warm_start": ORIGIN}
    from_checkpoint = warm.source(tmp_path / "four", specs(4), None)
    from_adapter = warm.source(tmp_path / "two", specs(2), result_of(specs(2), steps=2))
    assert (from_checkpoint.step, from_adapter.step) == (2, 2)
    assert from_checkpoint.folder.name == "checkpoint-2"
    for name, source in (("a", from_checkpoint), ("b", from_adapter)):
        warm.copy(source, tmp_path / name)
        row, _ = run(specs(1, **still), tmp_path / name)
        assert (row.status, row.steps, row.error) == ("finished", 1, None)
        assert not (tmp_path / name / warm.START).exists()
        torch.testing.assert_close(weights_of(tmp_path / name), weights_of(tmp_path / "two"), rtol=0, atol=0)


def test_weights_that_are_not_there_or_of_other_shapes_are_one_error(specs, tmp_path):
    tracker = Notes()
    trial.run(specs(1, train__warm_start=ORIGIN), trial.Place(tmp_path / "none", "cpu"), tracker, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run(specs(4), tmp_path / "four", stop_at=3)
    warm.copy(warm.source(tmp_path / "four", specs(4), None), tmp_path / "other")
    larger = specs(1, train__warm_start=ORIGIN, method={"name": "lora", "rank": 8})
    trial.run(larger, trial.Place(tmp_path / "other", "cpu"), tracker, lambda *_: None)
    missing, other = tracker.rows
    assert missing.status == other.status == "failed"
    assert "cannot start from what lora-1a2b3c4d had trained by step 2" in missing.error
    assert "it is not there, or not whole" in missing.error
    assert "(8, 64) for (4, 64)" in other.error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method.lr": 1e-5, "method.alpha": 4.0, "train.steps": 9, "data.max_length": 64}, None),
        ({"method.rank": 8}, "method.rank is 4 in ID and 8 in the clone"),
        ({"method": {"name": "dora", "rank": 4}}, "method.name is lora in ID and dora in the clone"),
        ({"model.name": "some/other"}, "model.name is some/model in ID and some/other in the clone"),
        ({"seed": 1}, "seed is 42 in ID and 1 in the clone"),
    ],
)
def test_the_same_weights_must_be_trained(settings, words):
    original = spec_of()
    if words is None:
        warm.check(original, original.changed(settings))
        return
    with pytest.raises(DataError, match=words.replace("ID", original.trial_id)):
        warm.check(original, original.changed(settings))


def test_a_method_of_several_stages_and_a_trial_without_weights_have_no_warm_start(tmp_path):
    hybrid = spec_of().changed({"method": HYBRID})
    with pytest.raises(DataError, match="qlora_galore does not train in one stage"):
        warm.check(hybrid, hybrid)
    with pytest.raises(DataError, match=r"has no checkpoint yet \(train.checkpoint_every: 5 minutes\); `pause`"):
        warm.source(tmp_path, spec_of(), None)
    with pytest.raises(DataError, match=r"\(failed\) left neither a checkpoint nor an adapter"):
        warm.source(tmp_path, spec_of(), result_of(spec_of(), status="failed"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    pissa = spec_of().changed({"method": {"name": "pissa", "rank": 4}})
    with pytest.raises(DataError, match="pissa saves another adapter than it trains"):
        warm.source(tmp_path, pissa, result_of(pissa))


def test_a_file_sets_no_warm_start_and_another_start_is_another_trial():
    spec = spec_of()
    started = spec.changed({"train.warm_start": ORIGIN})
    assert started.trial_id != spec.trial_id
    assert "warm start" in why_alone(started)
    with pytest.raises(SearchSpaceError, match="train.warm_start: no file can set it"):
        read.changed(spec, ["train.warm_start={trial: a, step: 1}"], "a clone")


def test_a_warm_trial_is_marked_and_compared_with_none():
    cold, base = row_of("lora", loss=2.0), row_of("none", loss=3.0)
    started = cold.spec.changed({"train.warm_start": ORIGIN})
    hot = cold.model_copy(update={"spec": started, "trial_id": started.trial_id, "scores": Scores(eval_loss=1.0)})
    named = {row.trial_id: row for row in rows([base, cold, hot])}
    assert (named[cold.trial_id].label, named[hot.trial_id].label) == ("lora", "lora warm")
    assert named[hot.trial_id].base is None
    assert named[hot.trial_id].eval_loss.difference is None

    compared = material([(base, POOR), (cold, POOR), (hot, REFERENCES)])
    (family,) = compared.families
    assert {unit.label for unit in family.units} == {"none", "lora"}
    assert compared.left_out == {"lora warm": "started warm, from lora-1a2b3c4d after its step 2"}
    assert best([base, cold, hot], 2)["lora"].trials == (cold.spec,)


def test_the_tracker_says_so(tmp_path, monkeypatch):
    entries = []
    tracker = TrialTracker(Store("file:none", "1", "small", "file:none"), None, "small", tmp_path)
    monkeypatch.setattr(tracker._outbox, "put", lambda *new: entries.extend(new))
    monkeypatch.setattr(tracker._sender, "start", tracker._answered.set)
    tracker.start(spec_of().changed({"train.warm_start": ORIGIN}))
    assert entries[0]["tags"]["ray_peft.warm_start"] == "lora-1a2b3c4d, step 2: not comparable"
