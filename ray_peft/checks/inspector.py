"""What the names in trials stand for: each model and its rows are inspected once, before anything starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ray_peft.errors import SpecError
from ray_peft.spec import ModelSpec, TrialSpec, is_local
from ray_peft.spec.identity import Content, canonical, trial_id
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Inspection, TaskType
from ray_peft.tasks.files import content_of
from ray_peft.tasks.model_content import folder_of
from ray_peft.tasks.remembered import Mark


class Inspector:
    """Checks trials, and settles which of them are the same by what is in their files."""

    def __init__(self) -> None:
        self._inspections: dict[str, Inspection] = {}
        self._fingerprints: dict[str, str] = {}
        self._commits: dict[tuple[str, str | None], str] = {}
        """Of hub models, by name and revision: a branch may move between two trials."""

    def inspect(self, trial: TrialSpec) -> Inspection:
        """What a trial's task reports on its model and data.

        Raises:
            DataError, ModelError: something is missing or malformed.
            SpecError: a method's stage would be left without a step.
        """
        trial = self._pinned(trial)
        models = [single.model.plain() for single in (trial, *trial.members())]
        evaluation = trial.evaluation.plain()
        decides = [trial.task, models, trial.data.plain(), trial.trained_as(), evaluation, trial.looked_for()]
        key = json.dumps(decides, sort_keys=True)
        task = TASKS[trial.task]
        if key not in self._inspections:
            self._inspections[key] = _inspected(trial, key)
        inspection = self._inspections[key]
        trial.method.stages(task.total_steps(trial, inspection.train_rows))
        return inspection

    def content(self, trial: TrialSpec) -> Content:
        """What a trial's names stand for. Raises as `inspect`."""
        trial = self._pinned(trial)
        benchmarks = getattr(trial.evaluation, "benchmarks", None)
        folder = benchmarks.include_path if benchmarks is not None else None
        files = content_of(Path(folder)) if folder is not None else ""
        return Content(self._fingerprint(trial.task, trial.model), self.inspect(trial).data_key, files)

    def settled(self, trial: TrialSpec) -> TrialSpec:
        """The trial under the id of its content, a hub model at its commit.

        Raises as `inspect`, and SpecError if two members are the same.
        """
        pinned, content = self._pinned(trial), self.content(trial)
        # The members' rows are those of the ensemble; only their models may differ.
        members = [
            trial_id(member, Content(self._fingerprint(member.task, member.model), content.data, content.files))
            for member in map(self._pinned, pinned.members())
        ]
        if len(set(members)) < len(members):
            raise SpecError(
                f"method.members: two members of an ensemble are the same trial ({', '.join(members)}): their models "
                "hold the same weights; give members that differ"
            )
        return pinned.under(trial_id(pinned, content, members), members)

    def _pinned(self, trial: TrialSpec) -> TrialSpec:
        """The trial with a hub model at the commit that its revision named at first; else the trial as it is."""
        model = trial.model
        if is_local(model.name):
            return trial
        if (model.name, model.revision) not in self._commits:
            folder = folder_of(model.name, model.revision, TASKS[trial.task].model_file)
            if folder is None:  # who loads the model says why
                return trial
            self._commits[model.name, model.revision] = folder.name
        revision = self._commits[model.name, model.revision]
        return trial.model_copy(update={"model": model.model_copy(update={"revision": revision})})

    def _fingerprint(self, task: str, model: ModelSpec) -> str:
        key = canonical([task, model.plain()])
        if key not in self._fingerprints:
            self._fingerprints[key] = _fingerprinted(TASKS[task], model)  # type: ignore[index]
        return self._fingerprints[key]


def _inspected(trial: TrialSpec, key: str) -> Inspection:
    """What a trial's task reports, now or in an earlier run on the same content."""
    task = TASKS[trial.task]
    content = task.content(trial)
    mark = Mark("inspection", [key, content])
    known = mark.read() if content is not None else None
    if known is not None and task.is_prepared(trial, known["data_key"]):
        return Inspection(**known)
    inspection = task.inspect(trial)
    if content is not None and task.content(trial) == content:  # no file changed meanwhile
        mark.write(asdict(inspection))
    return inspection


def _fingerprinted(task: TaskType[TrialSpec], model: ModelSpec) -> str:
    content = task.model_content(model)
    mark = Mark("fingerprint", [task.name, model.plain(), content])
    known = mark.read() if content is not None else None
    if known is not None:
        return str(known["fingerprint"])
    fingerprint = task.fingerprint(model)
    if content is not None and task.model_content(model) == content:
        mark.write({"fingerprint": fingerprint})
    return fingerprint
