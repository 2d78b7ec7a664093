"""One trial's life without Ray and MLflow: what an interrupted one leaves, and how it goes on."""

from __future__ import annotations

import gc
import json

import pytest
import tiny
from untracked import HYBRID, Notes, run

from ray_peft.spec import TrialSpec
from ray_peft.spec.keys import MICRO_BATCH
from ray_peft.trial import trial
from ray_peft.trial.life import Life


@pytest.mark.long
def test_a_hybrid_that_is_stopped_in_its_second_stage_goes_on_from_the_end_of_its_first(
    tiny_model, questions, tmp_path
):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, HYBRID, train__steps=8))
    whole, _ = run(spec, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "stopped", stop_at=6)
    kept = tmp_path / "stopped" / "stage1_adapter"
    assert {"adapter_model.safetensors", "adapter_config.json", trial.STAGE_FILE} <= {f.name for f in kept.iterdir()}
    again, tracker = run(spec, tmp_path / "stopped")
    assert again.status == "finished"
    assert (again.steps, again.resumed_from_step, whole.resumed_from_step) == (8, 4, None)
    assert again.scores.eval_loss == pytest.approx(whole.scores.eval_loss, rel=1e-4)
    assert again.boundary_losses == pytest.approx(whole.boundary_losses, rel=1e-4)
    assert 0.2 < again.usage.steps_per_s / whole.usage.steps_per_s < 5  # timed steps over their own seconds
    assert again.usage.train_tokens == whole.usage.train_tokens
    assert {"stage1_adapter", "adapter"} <= set(tracker.artifacts)
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept.is_dir()
    assert not (kept / trial.STAGE_FILE).exists()
    assert run(spec, tmp_path / "stopped")[0].resumed_from_step is None  # a finished trial starts anew


def test_an_optimizer_does_not_outlive_its_stage(tiny_model, questions, tmp_path):
    """Its state is as large as the weights, or twice that, and the evaluation wants the memory."""
    from torch.optim import Optimizer

    found: dict[str, int] = {}

    def count(metrics, step):
        alive = {id(each) for each in gc.get_objects() if issubclass(type(each), Optimizer)}
        found[next(iter(metrics))] = len(alive - before)

    gc.collect()
    # Of other tests in the process.
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), Optimizer)}
    gc.disable()
    try:
        spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, HYBRID))
        trial.run(spec, trial.Place(tmp_path, "cpu"), Notes(), count)
    finally:
        gc.enable()
    assert found["train_loss"] > 0
    moments = ("boundary_loss.after_stage_1", "boundary_loss.after_merge_1", "eval_loss")
    assert [found[moment] for moment in moments] == [0, 0, 0]


def test_the_row_of_a_stopped_trial_is_kept_and_says_so(tiny_model, questions, tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions))
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path, stop_at=2)
    row = json.loads((tmp_path / trial.RESULT_FILE).read_text())
    assert (row["status"], row["error"]) == ("cancelled", "stopped before the end")


def test_an_ensemble_refuses_members_that_were_trained_on_other_rows(tiny_model, questions, tmp_path):
    members = [{"method": {"name": "lora", "rank": 4, "lr": lr}} for lr in (0.01, 0.02)]
    plain = tiny.plain_spec(tiny_model, questions, {"name": "ensemble", "members": members})
    plain["data"]["sources"][0] |= {"validation": 6}
    spec = TrialSpec.from_plain(plain)
    rows = [run(member, tmp_path / "trials" / member.trial_id)[0] for member in spec.members()]

    def answered(given):
        place = trial.Place(tmp_path / "trials" / spec.trial_id, "cpu", members=tuple(given))
        return trial.run(spec, place, Notes(), lambda metrics, step: None)

    assert answered(rows).status == "finished"
    other = rows[1].model_copy(update={"provenance": rows[1].provenance.model_copy(update={"data_key": "other"})})
    refused = answered([rows[0], other])
    assert (refused.status, refused.scores.eval_loss) == ("failed", None)
    assert f"member {other.trial_id} was trained on other rows (prepared data other)" in refused.error
    assert "is cancelled" in answered([rows[0], rows[1].model_copy(update={"status": "cancelled"})]).error


def test_a_row_that_ran_out_of_memory_names_what_takes_less(tiny_model, questions, tmp_path, monkeypatch):
    """The GPU is a name and a size here; the ways are computed."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a card of no list")
    changes = {"train__batch_size": 512, "train__micro_batch_size": 512}
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **changes))
    life = Life(spec, trial.Place(tmp_path, "cuda:0", gpu_memory_gib=1.2), None, lambda metrics, step: None)
    life.lowered = {MICRO_BATCH: 129}  # half of what a pass held, and no divisor of the batch
    with life.process.clock.phase("train"):
        first, _, rest = trial._with_advice(life, "CUDA out of memory").partition("\n")
    assert first.startswith("ran out of 1.2 GiB of GPU memory with 129 rows a pass; what takes less: train.micro_ba")
    assert "does not fit" not in first
    assert rest.strip() == "CUDA out of memory"
    with life.process.clock.phase("evaluate"):
        assert trial._with_advice(life, "x").startswith("ran out of 1.2 GiB of GPU memory in the evaluation")


def test_what_was_chosen_runs_and_the_row_is_that_of_the_trial(tiny_model, questions, tmp_path):
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, train__fit="auto"))
    chosen = {"train.micro_batch_size": 8, "train.gradient_checkpointing": True}
    plain, _ = run(spec, tmp_path / "plain")
    place = trial.Place(tmp_path / "chosen", "cpu", chosen=chosen)
    result = trial.run(spec, place, Notes(), lambda metrics, step: None)
    assert (result.status, result.chosen, result.trial_id, result.spec) == ("finished", chosen, spec.trial_id, spec)
    assert result.scores.eval_loss == pytest.approx(plain.scores.eval_loss, rel=1e-4)


def test_a_merge_that_changes_the_loss_ends_the_trial_with_the_reason(tiny_model, questions, tmp_path, monkeypatch):
    from ray_peft.methods.qlora import QLoRA

    def forgets_the_adapter(stage, model):
        return model.unload().dequantize()

    monkeypatch.setattr(QLoRA, "merge", forgets_the_adapter)
    spec = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, HYBRID, train__steps=8))
    row, _ = run(spec, tmp_path)
    before, after = row.boundary_losses["after stage 1"], row.boundary_losses["after merge 1"]
    assert (row.status, row.steps) == ("failed", 4)
    assert row.error.startswith(
        f"merging what qlora trained changed the held-out loss from {before:.4f} to {after:.4f}"
    )


def test_the_row_of_a_quantised_base_says_which_share_is_in_4_bits(tiny_model, questions, tmp_path):
    method = {"name": "qlora", "rank": 4, "compute_dtype": "float32"}
    row, _ = run(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, method)), tmp_path)
    linear, rest = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64), 272 * 64 + 5 * 64
    assert row.four_bit_share == pytest.approx(linear / (linear + rest))
    assert row.arithmetic.startswith(
        "frozen base, 81% of its weights in nf4 computed in float32, the others in float32"
    )
    assert row.storage["float32"] == 4 * rest
