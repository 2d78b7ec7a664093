"""One comparison from its arguments to its answer; called again, it goes on where it was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray_peft.compare import budget, rungs
from ray_peft.compare.answer import answer
from ray_peft.compare.budget import BASE, Limits, Plan, TooShort
from ray_peft.compare.candidates import USUAL
from ray_peft.compare.journal import Journal, opened
from ray_peft.compare.measure import Measured, measure
from ray_peft.compare.rungs import ANSWER, LONGER, SEARCH, Chosen, file_of
from ray_peft.compare.setup import Setup, looked_at, set_up, short
from ray_peft.compare.speed_trials import RUNG
from ray_peft.errors import SpecError, TrialFailed
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.foundation.whole import write_text
from ray_peft.report.digits import duration
from ray_peft.report.files import read_material
from ray_peft.schedule import cluster, experiment
from ray_peft.schedule.signals import callers_signals
from ray_peft.schedule.sweep import SweepOutcome, sweep
from ray_peft.space.read import Space, load
from ray_peft.tasks.llm_sft.general_text import GENERAL_TOKENS
from ray_peft.trial.result import TrialResult

MANY_MORE = 4
"""Times the steps of the answer's trials from which on their learning rate may be too high: shorter trials want higher
ones (`candidates.FACTORS`)."""


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    model: str
    data: str
    hours: float = 2.0
    methods: tuple[str, ...] = USUAL
    metric: str | None = None
    """By which the answer is given: rouge_l or eval_loss; of pairs reward_accuracy. None is the first of these that the
    rows can have."""
    gpu_memory_gib: float | None = None

    def name(self) -> str:
        """Of the comparison, and of its folder unless another is given."""
        return re.sub(r"[^A-Za-z0-9._-]+", "_", f"compare-{short(self.model)}-{short(self.data)}")[:80].rstrip(".")


@dataclass(frozen=True)
class Comparison:
    """What a call leaves behind."""

    folder: Path
    lines: tuple[str, ...]
    """The answer, or where the plan is."""
    finished: bool
    """False if a trial of the last rung did not finish."""
    unsent: bool = False
    """Whether the tracking store lacks something."""


class _Once:
    """Passes on what a sweep says, each line once and without its tables: a comparison runs several sweeps."""

    def __init__(self, console: Audience) -> None:
        self._console = console
        self._earlier_lines: set[str] = set()

    def say(self, text: str) -> None:
        """Pass on a line that is new."""
        if text and "\n" not in text and text not in self._earlier_lines:
            self._earlier_lines.add(text)
            self._console.say(text)

    def progress(self, text: str) -> None:
        """Pass it on."""
        self._console.progress(text)


@experiment.in_working_folder
def compare(
    request: Request,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    console: Audience | None = None,
    plan_only: bool = False,
) -> Comparison:
    """Answer a request, or go on with it where an earlier call ended; other arguments and errors as of `sweep`."""
    comparing = Comparing(request, out=out, address=address, tracking_uri=tracking_uri, console=console)
    return comparing.run(plan_only=plan_only)


class Comparing:
    """One call of the command."""

    def __init__(
        self,
        request: Request,
        *,
        out: str | Path | None = None,
        address: str | None = None,
        tracking_uri: str | None = None,
        console: Audience | None = None,
    ) -> None:
        """As `sweep`, for all of its rungs."""
        self.request = request
        self.folder = Path(out) if out else experiment.outputs_folder() / request.name()
        self._ray, self._tracking_uri = cluster.KeptConnection(address), tracking_uri
        self._console = console or Silence()
        self._once = _Once(self._console)
        self._unsent = False
        self._on_gpu = False

    def run(self, *, plan_only: bool = False) -> Comparison:
        """Measure, plan, run the rungs and answer.

        Raises:
            RayPeftError: a wrong argument, a model or rows that cannot be used, a time that is too short, or no method
                that finishes.
            KeyboardInterrupt: the user stopped it; the same call goes on.
        """
        with callers_signals():
            try:
                return self._run(plan_only)
            except KeyboardInterrupt:
                if self.folder.is_dir():
                    self._console.say("finished trials are kept; the same command goes on with the others")
                raise
            finally:
                self._ray.leave()

    def _run(self, plan_only: bool) -> Comparison:
        request = self.request
        question = {
            "model": request.model, "data": request.data, "hours": request.hours, "methods": list(request.methods),
            "metric": request.metric or "rouge_l", "gpu_memory_gib": request.gpu_memory_gib,
        }  # fmt: skip
        journal = opened(self.folder, question)
        search_file = file_of(self.folder, SEARCH)
        if journal.plan is None or not search_file.is_file():
            self._plan(journal)
        else:
            self._console.say(f"going on with {search_file}")
        plan, self._on_gpu = journal.plan, journal.on_gpu
        assert plan is not None
        for line in rungs.plan_lines(plan, len(request.methods) - len(journal.left_out)):
            self._console.say(line)
        self._console.say(f"predicted: {duration(plan.whole_s)}; spent by now: {duration(journal.whole_s)}")
        if plan_only:
            return Comparison(self.folder, (f"the search space, to read or to change: {search_file}",), finished=True)
        try:
            chosen = self._search(journal, plan)
        except TrialFailed as error:
            return Comparison(self.folder, (str(error),), finished=False)
        last = self._answer(journal, plan, chosen)
        return self._said(journal, plan, chosen, last)

    def _plan(self, journal: Journal) -> None:
        """Look at everything, measure what is not known, and write the first search space."""
        request = self.request
        with journal.timed(RUNG):
            looked = looked_at(request.model, request.data, request.methods, request.metric)
            setup = set_up(looked, name=request.name(), methods=request.methods, nodes=self._ray.connect())
            self._say_found(setup)
            journal.on_gpu = self._on_gpu = setup.on_gpu
            measured = measure(
                setup, self.folder, request.gpu_memory_gib, self._sweep, self._once, 3600 * request.hours
            )
        journal.plan = self._planned(measured, journal)
        setup = measured.setup
        journal.left_out = dict(measured.left_out)
        journal.metric = setup.metric
        journal.steps_of_an_epoch = -(-setup.most_train // setup.batch_size)
        journal.write()  # makes the folder
        rungs.write_search(self.folder, measured, journal.plan, request.hours)

    def _say_found(self, setup: Setup) -> None:
        look = setup.look
        self._console.say(
            f"rows: {look.rows:,} of recipe {look.recipe}, {look.usable:,} usable, {look.repeated:,} repeat others; "
            f"half have up to {look.length(0.5)} tokens, nine in ten up to {look.length(0.9)}"
        )
        if not setup.on_gpu:
            limit = "; --gpu-memory-gib changes nothing" if self.request.gpu_memory_gib is not None else ""
            self._console.say(f"no GPU: trials run on the CPU, in float32, one after the other{limit}")

    def _planned(self, measured: Measured, journal: Journal) -> Plan:
        setup, hours = measured.setup, self.request.hours
        general_rows = round(GENERAL_TOKENS / measured.row_tokens)
        limits = Limits(setup.most_steps, setup.most_validation, setup.most_test, setup.answers, general_rows)
        names = [method.name for method in setup.methods]
        left_s = 3600 * hours - journal.whole_s
        try:
            return budget.plan(names, measured.seconds(), left_s, limits, measured.overhead_s)
        except TooShort as error:
            needed = (error.least_s + journal.whole_s) / 3600
            raise SpecError(
                f"--hours {hours:g}: the smallest comparison of {len(names)} methods is predicted to take "
                f"{duration(3600 * needed)} here; give --hours {needed * 1.02:.2g} or more, or fewer --methods"
                f"{', or --metric eval_loss' if setup.answers else ''}"
            ) from None

    def _search(self, journal: Journal, plan: Plan) -> dict[str, Chosen]:
        """Run the rungs that choose; returns the best of each method."""
        results = self._rung(journal, SEARCH)
        chosen = self._some(rungs.best(results, max(1, plan.longer)), results)
        if not plan.longer:
            return chosen
        if not file_of(self.folder, LONGER).is_file():
            rungs.write_next(self.folder, LONGER, chosen, steps=plan.longer_steps, evaluation={}, seeds=0)
        results = self._rung(journal, LONGER)
        longer = self._some(rungs.best(results, 1), results)
        return {name: replace(settings, tried=chosen[name].tried) for name, settings in longer.items()}

    def _some(self, chosen: dict[str, Chosen], results: Sequence[TrialResult]) -> dict[str, Chosen]:
        if not chosen:
            reasons = sorted({(row.error or row.status).splitlines()[0] for row in results})
            raise TrialFailed(f"no trial of any method finished: {'; '.join(reasons)}")
        return chosen

    def _answer(self, journal: Journal, plan: Plan, chosen: dict[str, Chosen]) -> SweepOutcome:
        """Train the chosen settings with new seeds, and score them and the base on the test rows."""
        file = file_of(self.folder, ANSWER)
        if not file.is_file():
            spent = sum(journal.spent_s.get(rung, 0.0) for rung in (SEARCH, LONGER))
            left_s = 3600 * self.request.hours - journal.whole_s
            steps = budget.shortened(plan, left_s, spent / (plan.search_s + plan.longer_s))
            if steps < plan.answer_steps:
                self._console.say(
                    f"the sweeps before took {duration(spent)}, more than predicted: {ANSWER} has {steps} steps in "
                    f"place of {plan.answer_steps}"
                )
            best = {name: replace(settings, trials=settings.trials[:1]) for name, settings in chosen.items()}
            rungs.write_next(
                self.folder, ANSWER, best, steps=steps, seeds=plan.seeds,
                evaluation={"split": "test", "generate": self._metric(journal) == "rouge_l", "general_text": True},
            )  # fmt: skip
        space = load(file)
        first = space.trials[0].seed
        # No seed changes the untouched base.
        trials = [trial for trial in space.trials if trial.method.name != BASE or trial.seed == first]
        with journal.timed(ANSWER):
            return self._sweep(replace(space, trials=trials), self.folder / ANSWER, self._console)

    def _metric(self, journal: Journal) -> str:
        """What decides the answer; an older journal does not say it, and has no pairs."""
        return journal.metric or self.request.metric or "rouge_l"

    def _rung(self, journal: Journal, rung: str) -> list[TrialResult]:
        with journal.timed(rung):
            return self._sweep(file_of(self.folder, rung), self.folder / rung).results

    def _sweep(self, space: Space | Path, folder: Path, console: Audience | None = None) -> SweepOutcome:
        outcome = sweep(
            space,
            out=folder,
            connection=self._ray,
            tracking_uri=self._tracking_uri,
            gpu_memory_gib=self.request.gpu_memory_gib if self._on_gpu else None,
            console=console or self._once,
        )
        if outcome.interrupted:
            raise KeyboardInterrupt
        self._unsent = self._unsent or bool(outcome.unsent)
        return outcome

    def _said(self, journal: Journal, plan: Plan, chosen: Mapping[str, Chosen], last: SweepOutcome) -> Comparison:
        """The answer in five lines, kept in answer.txt, and the command that trains it on all rows."""
        verdict = answer(read_material(last.folder), chosen)
        measuring_s = journal.spent_s.get(RUNG, 0.0)
        lines = [
            *verdict.lines,
            f"Predicted {duration(plan.whole_s)}, took {duration(journal.whole_s - measuring_s)} after "
            f"{duration(measuring_s)} of measuring, of {duration(3600 * self.request.hours)}. "
            f"Report: {last.folder / 'report.html'}",
        ]
        if verdict.take is not None:
            steps = verdict.take.train.steps or 0
            epochs = max(1.0, round(steps / max(1, journal.steps_of_an_epoch), 2))
            file = rungs.train_all(self.folder, verdict.take, epochs=epochs)
            whole = round(epochs * journal.steps_of_an_epoch)
            caution = (
                f". Its {whole:,} steps are many more than the {steps:,} for which the learning rate was chosen: a "
                "lower one may be better"
            )
            line = f"Train it on all rows but the test rows: ray-peft run {file}"
            lines.append(line + (caution if whole >= MANY_MORE * steps else ""))
        lines += [f"Left out: {name}: {reason}" for name, reason in journal.left_out.items()]
        write_text(self.folder / "answer.txt", "\n".join(lines) + "\n")
        return Comparison(self.folder, tuple(lines), finished=last.finished, unsent=self._unsent)
