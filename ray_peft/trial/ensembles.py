"""An ensemble as a trial: load its members, tune their weights, answer. Its cost includes that of its members."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ray_peft.errors import TrialFailed
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Bench, MemberModel
from ray_peft.trial.life import Life, Place, evaluate, predict, provenance
from ray_peft.trial.result import TrialResult, Usage


def run_ensemble(life: Life) -> TrialResult:
    """Load the members, tune their weights, and answer; the row's cost includes that of the members."""
    spec, place = life.spec, life.place
    rows = _member_rows(spec, place)
    life.process.memory.start()  # before loading: that all members are held at once is what an ensemble costs
    with tempfile.TemporaryDirectory(prefix="ray_peft_members_") as scratch:
        with life.process.clock.phase("load"):
            # The members as they are named today: an earlier row's files may have been elsewhere.
            models = [
                MemberModel(member, _weights(life, row, Path(scratch) / row.trial_id))
                for member, row in zip(spec.members(), rows, strict=True)
            ]
            bench = TASKS[spec.task].load_ensemble(spec, models, place.device)
        life.provenance = life.provenance.model_copy(update=provenance(bench, place))
        life.lowered = bench.lowered
        if place.device != "cpu":
            predict(life, bench)
            life.predicted = _largest([life.predicted, *(row.predicted for row in rows)])
        _check_same_rows(rows, bench)
        life.parameters = (sum(row.trainable_parameters for row in rows), bench.parameters()[1])
        life.adapter_bytes = sum(row.adapter_bytes for row in rows)
        with life.process.clock.phase("evaluate"):
            weights = bench.tune()
            life.weights = {row.trial_id: weight for row, weight in zip(rows, weights, strict=True)}
            life.report({f"weight.{trial}": weight for trial, weight in life.weights.items()}, 0)
            evaluate(life, bench)
    life.process.memory.stop()
    result = life.result("finished")
    return result.model_copy(update={"usage": _with_members(result.usage, [row.usage for row in rows])})


def _member_rows(spec: TrialSpec, place: Place) -> list[TrialResult]:
    """The members' rows in the ensemble's order.

    Raises:
        TrialFailed: one has no finished row.
    """
    known = {row.trial_id: row for row in place.members}
    member_rows = []
    for member in spec.members():
        row = known.get(member.trial_id)
        if row is None or row.status != "finished":
            why = f"is {row.status}" if row is not None else "has no row in this sweep's folder"
            raise TrialFailed(f"member {member.trial_id} {why}; an ensemble needs all its members finished")
        member_rows.append(row)
    return member_rows


def _check_same_rows(rows: list[TrialResult], bench: Bench) -> None:
    """Raise TrialFailed if a member was trained on other rows: a trial's id names files, which may have changed."""
    for row in rows:
        if row.provenance.data_key != bench.data_key:
            raise TrialFailed(
                f"member {row.trial_id} was trained on other rows (prepared data {row.provenance.data_key}) than those "
                f"of now ({bench.data_key}), so its training rows may be test rows; run the sweep again with --fresh"
            )


def _weights(life: Life, row: TrialResult, scratch: Path) -> Path | None:
    """The folder with what a member trained: its own, or a download from the tracker; None if nothing was trained."""
    if not row.adapter_bytes:
        return None
    beside = life.place.folder.parent / row.trial_id / "adapter"
    if beside.is_dir():
        return beside
    assert life.tracker is not None
    assert row.mlflow_run_id is not None
    return life.tracker.fetch(row.mlflow_run_id, "adapter", scratch)


def _largest(predicted: list[dict[str, float]]) -> dict[str, float]:
    """The prediction with the largest peak: what an ensemble costs is what its members cost, too."""
    return max(predicted, key=lambda prediction: prediction.get("peak_allocated_gib", 0.0))


def _with_members(own: Usage, members: list[Usage]) -> Usage:
    """What an ensemble costs: training all members in turn, then answering with all of them in memory."""

    def largest(name: str) -> float | None:
        return max((value for usage in (own, *members) if (value := getattr(usage, name)) is not None), default=None)

    peaks = {name: largest(name) for name in Usage.model_fields if name.startswith(("peak_", "device_", "spilled_"))}
    return own.model_copy(update={**peaks, "train_s": sum(usage.train_s for usage in members)})
