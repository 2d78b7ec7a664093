"""What earlier runs of a sweep left in its folder, and which of today's trials it answers.

A row answers a trial if their settings are the same and both were made of the same content, whatever the row's id is.
So rows of release 0.1.0, whose ids held absolute paths, count as finished, and rows of a file that has changed under
the same name do not. Rows of a pass (`train.micro_batch_size`) are passed over where no loss depends on them, unless
today's trials compare them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ray_peft.checks.inspector import Inspector
from ray_peft.errors import RayPeftError
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec, is_local
from ray_peft.spec.identity import Content, canonical, settings
from ray_peft.tasks import TASKS
from ray_peft.trial.result import DONE, TrialResult


@dataclass
class Earlier:
    """Today's trials, and the rows that the folder already has for them."""

    trials: list[TrialSpec] = field(default_factory=list)
    """In today's order; a finished one has the id of its row."""
    finished: dict[str, TrialResult] = field(default_factory=dict)
    """The rows that answer them, by trial id."""
    renewed: list[TrialResult] = field(default_factory=list)
    """Those of them that must be written again, since release 0.1.0 named their content differently."""
    notes: list[str] = field(default_factory=list)
    """Trials that run again, and why."""


class Rows:
    """The finished rows of a folder."""

    def __init__(self, rows: Sequence[TrialResult], inspector: Inspector) -> None:
        self._inspector = inspector
        self._by_settings: dict[str, list[TrialResult]] = {}
        self._by_losses: dict[str, list[TrialResult]] = {}
        self._released: dict[str, Content | None] = {}
        for row in rows:
            self._by_settings.setdefault(canonical(settings(row.spec)), []).insert(0, row)  # the newest first
            if (key := loss_settings(row.spec)) is not None:
                self._by_losses.setdefault(key, []).insert(0, row)

    def answering(self, trial: TrialSpec) -> TrialResult | None:
        """The row of a trial that is settled, under the keys of today; None if it must run."""
        return self._of(self._alike(trial), trial)

    def of_other_passes(self, trial: TrialSpec, used_ids: Container[str]) -> TrialResult | None:
        """The row of a trial that had the same losses in passes of other sizes; None if there is none.

        Args:
            trial: one without an answer.
            used_ids: ids of rows that answer other trials.
        """
        key = loss_settings(trial)
        alike = self._by_losses.get(key, []) if key is not None else []
        return self._of([row for row in alike if row.trial_id not in used_ids], trial)

    def _of(self, candidates: Sequence[TrialResult], trial: TrialSpec) -> TrialResult | None:
        if not candidates:
            return None
        content = self._inspector.content(trial)
        for row in sorted(candidates, key=lambda row: row.trial_id != trial.trial_id):
            if trial.members() and set(row.members) != {member.trial_id for member in trial.members()}:
                continue
            if self._same_content(row, trial, content):
                content_keys = {"model_fingerprint": content.model, "data_key": content.data}
                return row.model_copy(update={"provenance": row.provenance.model_copy(update=content_keys)})
        return None

    def changed(self, trial: TrialSpec, used_ids: set[str]) -> str | None:
        """What has changed since a trial of these names was finished; None if there was none.

        Args:
            trial: one without an answer.
            used_ids: ids of rows that answer other trials.
        """
        unused = [row for row in self._alike(trial) if row.trial_id not in used_ids]
        named = [row for row in unused if _names(row.spec) == _names(trial)]
        if not named or trial.members():
            return None
        released = self._of_release(named[0], trial)
        models = {self._inspector.content(trial).model, released.model if released is not None else None}
        return "rows" if named[0].provenance.model_fingerprint in models else "model"

    def _alike(self, trial: TrialSpec) -> list[TrialResult]:
        return self._by_settings.get(canonical(settings(trial)), [])

    def _same_content(self, row: TrialResult, trial: TrialSpec, content: Content) -> bool:
        keys = (row.provenance.model_fingerprint, row.provenance.data_key)
        if not is_local(trial.model.name) and row.spec.model.name != trial.model.name:
            return False
        if keys == (None, None):
            return row.trial_id == trial.trial_id
        if keys == (content.model, content.data):
            return True
        released = self._of_release(row, trial)
        return released is not None and keys == (released.model, released.data)

    def _of_release(self, row: TrialResult, trial: TrialSpec) -> Content | None:
        """What release 0.1.0 would have called today's content; None if the row is of a later one."""
        if row.provenance.versions.get("ray-peft", "0.1.0") != "0.1.0":
            return None
        key = canonical([row.spec.data.plain(), trial.model.plain(), trial.data.plain(), trial.loss_line()])
        if key not in self._released:
            try:
                self._released[key] = TASKS[trial.task].released(trial, row.spec)
            except RayPeftError:
                self._released[key] = None
        return self._released[key]


def recall(
    trials: Sequence[TrialSpec], rows: Sequence[TrialResult], inspector: Inspector, *, stopped: bool = False
) -> Earlier:
    """Which of today's trials are finished, and why others are not any more.

    Args:
        trials: settled, an ensemble after its members.
        rows: the last row of every trial in the folder.
        inspector: that settled the trials.
        stopped: rows of trials that were stopped early answer them, too: the sweep stops such trials.
    """
    finished = [row for row in rows if row.status == "finished" or (stopped and row.status in DONE)]
    known, earlier = Rows(finished, inspector), Earlier()
    written = {row.trial_id: row for row in finished}
    ids: dict[str, str] = {}
    keys = Counter(loss_settings(trial) for trial in trials) if finished else Counter()
    exact = {row.trial_id for trial in trials if (row := known.answering(trial)) is not None} if finished else set()
    others = 0
    for trial in trials:
        members = [ids.get(member.trial_id, member.trial_id) for member in trial.members()]
        now = trial.under(trial.trial_id, members)
        row = known.answering(now) if finished else None
        if finished and row is None and keys[loss_settings(trial)] == 1:
            row = known.of_other_passes(now, exact)
            others += row is not None
        if row is not None:
            ids[trial.trial_id] = row.trial_id
            now = trial.under(row.trial_id, members)
            earlier.finished[row.trial_id] = row
            earlier.renewed += [row] if row != written[row.trial_id] else []
        earlier.trials.append(now)
    if others:
        earlier.notes.append(
            f"{others} trials count as finished that ran with other rows a pass (train.micro_batch_size): in fp32 no "
            "loss depends on them; memory and time are those of that run, and --fresh measures them anew"
        )
    open_trials = [trial for trial in earlier.trials if trial.trial_id not in earlier.finished] if finished else []
    reasons = [known.changed(trial, set(earlier.finished)) for trial in open_trials]
    for what in ("rows", "model"):
        if count := reasons.count(what):
            earlier.notes.append(f"{count} trials run again: their {what} changed since; the earlier results are kept")
    return earlier


def loss_settings(spec: TrialSpec) -> str | None:
    """The settings that decide a trial's losses, where the rows of a pass do not; None where they do.

    Rows of a pass change losses in bf16, where sums are rounded differently, and with dropout, whose draws depend on
    them.
    """
    kinds = [stage for part in (spec, *spec.members()) for stage, _ in part.method.stages(ENOUGH_STEPS)]
    if spec.train.precision != "fp32" or any(getattr(stage, "dropout", 0) for stage in kinds):
        return None
    alike = settings(spec)
    train = {name: value for name, value in alike.get("train", {}).items() if name != "micro_batch_size"}
    return canonical({**alike, "train": train})


def _names(spec: TrialSpec) -> str:
    """What a trial calls its model and data, and how it prepares them, wherever its files lie."""
    return canonical(_short([spec.model.name, spec.model.tokenizer, spec.data.plain()]))


def _short(plain: Any) -> Any:
    """Plain data with the last part of every path in its place."""
    if isinstance(plain, dict):
        return {key: _short(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_short(value) for value in plain]
    return PurePath(plain).name if isinstance(plain, str) and plain.startswith(("/", "~", ".")) else plain
