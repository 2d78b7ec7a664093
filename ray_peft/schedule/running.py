"""A sweep while its trials run: what Tune is given, the rows that come back, and what its user asks for meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_peft.errors import ClusterLost, PlacementError, ReportLost, StorageError, first_line
from ray_peft.report.digits import counted
from ray_peft.report.plain import trial_line
from ray_peft.schedule import cluster, tune
from ray_peft.schedule.control import Control
from ray_peft.schedule.decide import Decision, Demand, Node, Phase, Run
from ray_peft.schedule.early import EarlyStopping
from ray_peft.schedule.experiment import Experiment
from ray_peft.schedule.packs import may_join
from ray_peft.schedule.plan import pack_text
from ray_peft.schedule.search import Draws
from ray_peft.schedule.sizes import Scheduler
from ray_peft.spec import TrialSpec
from ray_peft.store.adopted import left_row
from ray_peft.store.earlier import Earlier
from ray_peft.store.progress import Driver
from ray_peft.trial.result import TrialResult

MOST_LOSSES = 3
"""Deaths of a local Ray without a row in between, after which a sweep gives up."""


@dataclass(frozen=True)
class Plan:
    """The trials of a sweep, and what is there of them."""

    trials: list[TrialSpec]
    """Of a search, those that show their kind."""
    todo: list[TrialSpec]
    earlier: Earlier
    draws: Draws | None
    """What proposes the trials; None where they are known."""
    total: int
    """Trials that the sweep is to end with."""
    early: EarlyStopping | None = None
    """What ends running trials early."""

    @property
    def missing(self) -> int:
        """Trials that are to run."""
        return self.total - len(self.earlier.finished) if self.draws is not None else len(self.todo)


class SweepRun:
    """Gives trials to Tune, and receives their rows."""

    def __init__(
        self, plan: Plan, opened: Experiment, scheduler: Scheduler, ray: cluster.Connection, driver: Driver
    ) -> None:
        self.scheduler = scheduler
        self.ray = ray
        self.losses_in_a_row = 0
        """Clusters that died since the last row."""
        self.plan = plan
        self.opened = opened
        self.console = opened.console
        self.rows: dict[str, TrialResult] = dict(plan.earlier.finished)
        self.started: dict[str, TrialSpec] = {}
        """Trials that were handed out, by their id."""
        self.demands: dict[str, Demand] = {}
        """What the trials hold, or held last, by their id."""
        self.unproposed: StorageError | None = None
        """Why the search could propose no more."""
        self.apart: dict[str, TrialSpec] = {}
        """Trials without a row whose pack could not go on, by their id: they run once more, each by itself."""
        self.folder = opened.ledger.folder
        if plan.early is not None:
            rows = plan.earlier.finished.values()
            plan.early.remember((row.spec, opened.ledger.trial_folder(row.trial_id)) for row in rows)
        self.proposed = plan.draws is not None
        self.control = Control(self, driver)
        self.proposal_count = 0
        """Trials of packs that the search has proposed."""
        self.unjoined: list[TrialSpec] = []
        """Proposals that could not join the pack for which they were made."""
        self.late: dict[str, Run] = {}
        """Of the present phase, single trials added to those that it began with, by the user or to a pack."""

    def run(self, nodes: list[Node]) -> bool:
        """Run the missing trials and leave the cluster; true if the user interrupted them."""
        why = "interrupted before the end"
        try:
            decision = self.scheduler.decide(self.plan.todo or self.plan.trials)
            self.console.say(_placement_line(nodes, [run.demand for run in decision.runs], self.plan.missing))
            with self.control.taking():
                ended = all(self._ended(phase.runs, phase.most_teams) for phase in self._phases(decision))
            # Nothing is taken any more when one looks for the rest, so that what was promised runs.
            while ended and (rest := self._taken(self.control.rest())):
                with self.control.taking():
                    ended = self._ended(rest)
        except ClusterLost as error:
            why = str(error)
            raise
        finally:
            try:
                if self._without_row():
                    self.ray.leave()  # no worker may still write to the runs that are closed here
                else:
                    self.ray.close()
            finally:  # also after a second Ctrl-C
                lost = self._without_row()
                for trial in lost:
                    self._take_lost(trial, why)
        if self.unproposed is not None:
            raise ReportLost(f"{self.unproposed}; what finished is kept, and the same command goes on")
        lost = [trial for trial in lost if trial.trial_id not in self.rows]
        return bool(lost) or self._interrupted([] if self.plan.draws is not None else self.plan.todo)

    def _ended(self, runs: Sequence[Run], most: int | None = None) -> bool:
        """Run trials, and once more those that ran out of too small a share; false if the user interrupted them."""

        def trials() -> list[TrialSpec]:
            return [trial for run in (*runs, *self.late.values()) for trial in run.trials]

        self.late.clear()
        for run in runs:
            if run.is_pack:
                self.console.say(f"{pack_text(run)}: {', '.join(trial.trial_id for trial in run.trials)}")
        self._fit(runs, most)
        again = [] if self._interrupted(trials()) else [*self._too_small(trials()), *self.apart.values()]
        self.apart.clear()
        if again:
            self._fit(self.scheduler.decide(again, alone={trial.trial_id for trial in again}).runs)
        return not self._interrupted(trials())

    def _without_row(self) -> list[TrialSpec]:
        """Trials that were handed out and have no row."""
        return [trial for trial in self.started.values() if trial.trial_id not in self.rows]

    def _take_lost(self, trial: TrialSpec, why: str) -> None:
        """Keep the row of a trial that was running when everything ended; it may have finished in that moment."""
        row = self.opened.lost(trial, "cancelled", why)
        self.opened.keep(row)
        if row.status != "cancelled":
            self.rows[trial.trial_id] = row

    def _phases(self, decision: Decision) -> Iterator[Phase]:
        """What runs one after the other; all that a search proposes one by one runs in one phase."""
        draws = self.plan.draws
        if draws is None:
            yield from decision.phases
            return
        if not any(run.is_pack for run in decision.runs):
            yield Phase((), next((phase.most_teams for phase in decision.phases), None))
            return
        while True:
            trials, self.unjoined = self.unjoined, []
            try:
                more = draws.next_ones(min(decision.at_once - len(trials), self.plan.missing - self.proposal_count))
            except StorageError as error:
                self.unproposed = error
                return
            self.proposal_count += len(more)
            if not trials + more:
                return
            yield from self.scheduler.decide(trials + more).phases

    def _too_small(self, trials: list[TrialSpec]) -> list[TrialSpec]:
        """Trials that ran out of the share of a GPU that was predicted for them: they run once more, alone."""
        small = []
        for trial in trials or list(self.started.values()):
            row, demand = self.rows.get(trial.trial_id), self.demands[trial.trial_id]
            shared = trial.resources.gpus_per_worker is None and 0 < demand.gpus_per_worker < 1
            if row is not None and row.status == "out_of_memory" and shared:
                self.console.say(f"{trial.trial_id} ran out of its share of a GPU; once more, alone")
                del self.rows[trial.trial_id]
                small.append(trial)
        return small

    def _interrupted(self, trials: list[TrialSpec]) -> bool:
        """True if Tune came back before all of them, or all proposals, had a row: the user stopped it."""
        draws = self.plan.draws
        few = not trials and draws is not None and not draws.exhausted and len(self.started) < self.plan.missing
        expected = {trial.trial_id for trial in trials or self.started.values()}
        return few or bool(expected - self.rows.keys() - self.apart.keys())

    def _fit(self, runs: Sequence[Run], most: int | None = None) -> None:
        """Run trials at once; what a search proposes, if there are none. A local Ray that dies is started again."""
        self.demands |= {trial.trial_id: run.demand_of(trial) for run in runs for trial in run.trials}
        member_ids = {member.trial_id for run in runs for member in run.trials[0].members()}
        while self.control.resumed():
            members = {trial_id: row for trial_id, row in self.rows.items() if trial_id in member_ids}
            propose, samples = (None, 0) if runs else (self._propose, self.plan.missing - len(self.started))
            judged = self.plan.early is not None
            work = tune.Work(runs, propose, self._more, lambda: self.control.paused, samples, most, members, judged)
            try:
                if not tune.fit(work, self.opened, self):
                    return
            except ClusterLost as error:
                self._replace_cluster(error)
            if not runs:  # those that were running, then further proposals
                running = self._without_row()
                if running:
                    self._fit([Run((trial,), self.demands[trial.trial_id]) for trial in running], most)
                if len(self.started) >= self.plan.missing or (self.plan.draws and self.plan.draws.exhausted):
                    return
                continue
            runs = still_to_run(runs, self.late, self.rows.keys())
            if not runs:
                return

    def _more(self) -> Run | None:
        """A run that the user wants by now, beside those that Tune was given."""
        run = self.control.next()
        if run is not None:
            self._taken([run])
            self.late[run.trial.trial_id] = run
        return run

    def _taken(self, runs: list[Run]) -> list[Run]:
        """The same runs; rows of earlier attempts of their trials are no longer theirs."""
        for run in runs:
            for trial in run.trials:
                self.rows.pop(trial.trial_id, None)
                self.started.pop(trial.trial_id, None)  # as if for the first time
                self.demands[trial.trial_id] = run.demand_of(trial)
        return runs

    def trials(self) -> dict[str, TrialSpec]:
        """The trials of the sweep that are known, by their id."""
        planned = {} if self.proposed else {trial.trial_id: trial for trial in self.plan.earlier.trials}
        return {**planned, **self.started}

    def row(self, trial_id: str) -> TrialResult | None:
        """The row of a trial, if it has one by now."""
        return self.rows.get(trial_id)

    def place(self, trial: TrialSpec) -> Run:
        """What a trial beside the planned ones holds; it runs by itself."""
        (run,) = self.scheduler.decide([trial]).runs
        return run

    def note(self, text: str) -> None:
        """Say something, also in the report."""
        self.console.say(text)
        self.opened.record.notes.append(text)
        self.opened.ledger.write_record(self.opened.record)

    def _replace_cluster(self, error: ClusterLost) -> None:
        """Start another local Ray; trials that were running count its death as a failure of their workers.

        Raises:
            ClusterLost: it cannot be, or would be of no use.
        """
        self.losses_in_a_row += 1
        if not self.ray.replaceable or self.losses_in_a_row > MOST_LOSSES:
            raise error
        self.console.say(f"caution: {error.reason}; another local Ray is started")
        try:
            self.ray.replace()
        except PlacementError as failure:
            raise ClusterLost(f"{error.reason}, and {first_line(failure)}") from None
        for trial in self._without_row():
            if self.opened.may_start_again(trial):
                self.again(trial, error.reason)
            else:
                self.lose(trial, error.reason)

    def _propose(self) -> Run | None:
        """The next run that the search proposes."""
        try:
            trial = self.plan.draws.next() if self.plan.draws is not None else None
        except StorageError as error:  # what runs goes on
            self.unproposed, trial = error, None
        if trial is None:
            return None
        (run,) = self.scheduler.decide([trial]).runs
        self.demands[trial.trial_id] = run.demand
        return run

    def begin(self, spec: TrialSpec) -> None:
        """A trial was handed out; one that a search proposed is planned from now on."""
        if spec.trial_id in self.rows:  # of a pack whose process died after that
            return
        again = spec.trial_id in self.started
        self.started[spec.trial_id] = spec
        self.opened.begin(spec, again=again)
        record = self.opened.record
        if spec.trial_id not in record.planned:
            record.planned.append(spec.trial_id)
            self.opened.ledger.write_record(record)

    def take(self, result: TrialResult) -> None:
        """Keep a trial's row as soon as it is there."""
        if result.trial_id in self.rows:
            return
        self.rows[result.trial_id] = result
        self.losses_in_a_row = 0
        self.opened.keep(result)
        if self.plan.draws is not None:
            self.plan.draws.tell_row(result)
        self.console.say(trial_line(result, len(self.rows), self._total()))

    def _total(self) -> int:
        """Trials that the sweep is to end with, as of now."""
        return self.plan.total + len(self.control.added)

    def lose(self, spec: TrialSpec, reason: str) -> None:
        """Keep a row of a trial whose worker died, if it left none."""
        if spec.trial_id not in self.rows:
            self.take(self.opened.lost(spec, "failed", reason))

    def again(self, spec: TrialSpec, reason: str) -> None:
        """A worker died, and its trial is started once more."""
        if spec.trial_id not in self.rows:
            self.opened.again(spec, reason)

    def further(self, specs: Sequence[TrialSpec]) -> Run | None:
        """What a search proposes to train with these, if it may; else it waits for the next pack."""
        if self.plan.draws is None or self.plan.missing <= self.proposal_count:
            return None
        run = self._propose()
        self.proposal_count += run is not None
        if run is None or may_join(run.trial, specs):
            self.late |= {run.trial.trial_id: run} if run is not None else {}
            return run
        self.unjoined.append(run.trial)
        return None

    def lose_pack(self, specs: Sequence[TrialSpec], reason: str) -> None:
        """Keep the rows that trials of a pack have left; the others run once more by themselves."""
        for spec in specs:
            if spec.trial_id in self.rows:
                continue
            if left_row(self.opened.ledger.trial_folder(spec.trial_id), spec.trial_id) is not None:
                self.lose(spec, reason)
            else:
                self.apart[spec.trial_id] = spec
                self.opened.again(spec, reason)

    def show(self, spec: TrialSpec, metrics: Mapping[str, Any]) -> None:
        """Show where a running trial is, and end it if others are better."""
        reason = self.plan.early.judge(spec, metrics) if self.plan.early is not None else None
        if reason is not None:
            self.opened.stop_early(spec, reason)
        loss = next((f"{name} {metrics[name]:.3f}" for name in ("train_loss", "eval_loss") if name in metrics), "")
        ended, total = len(self.rows), self._total()
        bar = f"{_bar(ended, total)} {ended}/{total}"
        self.console.progress(f"{bar} {spec.trial_id}: step {metrics.get('step')} {loss}")


def still_to_run(runs: Sequence[Run], late: Mapping[str, Run], ended: Collection[str]) -> list[Run]:
    """What is left of runs, each trial once.

    Args:
        runs: as they were planned.
        late: single runs that the user wanted since, by their trial; one of a trial in `runs` stands in its place.
        ended: ids of the trials that have a row.
    """
    left = []
    for run in runs:
        trials = tuple(trial for trial in run.trials if trial.trial_id not in {*ended, *late})
        left += [replace(run, trials=trials)] if trials else []
    return left + [run for trial_id, run in late.items() if trial_id not in ended]


def _placement_line(nodes: list[Node], demands: list[Demand], missing: int) -> str:
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    kinds = {(demand.num_workers, demand.gpus_per_worker, demand.cpus_per_worker) for demand in demands}
    needs = [f"{workers} x ({gpu:g} GPU, {cpu} CPU)" for workers, gpu, cpu in sorted(kinds, reverse=True)]
    need = "; ".join(needs) if len(needs) < 4 else f"between {needs[0]} and {needs[-1]}"
    where = f"{counted(gpus, 'GPU')} and {counted(cpus, 'CPU core')} on {counted(len(nodes), 'node')}"
    return f"{where}; {counted(missing, 'trial')} to run, each {need}"


def _bar(ended: int, total: int, width: int = 20) -> str:
    """An ASCII progress bar such as `[#####...............]`."""
    filled = width if total <= 0 else min(width, width * ended // total)
    return "[" + "#" * filled + "." * (width - filled) + "]"
