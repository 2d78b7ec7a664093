"""Which running trials end early: Tune's rules, applied to held-out losses that are comparable."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ray_peft.space.search import SearchSpec
from ray_peft.spec import TrialSpec

LOSS = "eval_loss"
"""What is compared: the metric of an evaluation."""


@dataclass(frozen=True)
class _Trial:
    """A trial, as Tune's rules see one."""

    trial_id: str


class EarlyStopping:
    """A rule for each kind of trials. It lives as long as the sweep's driver, beyond a pause or the loss of a Ray."""

    def __init__(self, search: SearchSpec) -> None:
        """Prepare.

        Args:
            search: with a scheduler.
        """
        assert search.scheduler is not None
        self._search = search
        self._rules: dict[str, Any] = {}
        """Tune's schedulers, by what makes losses comparable."""
        self._judged: set[tuple[str, int]] = set()
        """Trial and step of every loss: one that goes on from a checkpoint reports some of them again."""
        self._added: set[str] = set()

    def judge(self, spec: TrialSpec, metrics: Mapping[str, Any]) -> str | None:
        """Take what a running trial reports; returns why it is to end, None if it goes on, as every warm start does."""
        from ray.tune.schedulers import TrialScheduler

        if LOSS not in metrics or "step" not in metrics or spec.train.warm_start is not None:
            return None
        step, loss = int(metrics["step"]), float(metrics[LOSS])
        if (spec.trial_id, step) in self._judged:
            return None
        self._judged.add((spec.trial_id, step))
        decision = self._rule_of(spec).on_trial_result(None, _Trial(spec.trial_id), {"step": step, LOSS: loss})
        if decision == TrialScheduler.CONTINUE:
            return None
        rule = self._search.scheduler
        among = f"above the median of other {spec.method.name} trials"
        if rule == "asha":
            among = f"not in the best 1/{self._search.reduction} of {spec.method.name} trials at this step"
        return f"stopped after step {step}: its held-out loss {loss:.5g} is {among} (search.scheduler: {rule})"

    def remember(self, trials: Iterable[tuple[TrialSpec, Path]]) -> None:
        """Take the losses of trials that have ended in an earlier run of the sweep.

        Args:
            trials: with their folders.
        """
        for spec, folder in trials:
            for metrics in _logged(folder / "metrics.jsonl"):
                self.judge(spec, metrics)

    def _rule_of(self, spec: TrialSpec) -> Any:
        """The rule of the trials whose losses are comparable with this one's."""
        alike = [spec.task, spec.model.plain(), spec.data.plain(), spec.evaluation.plain(), spec.method.name]
        key = json.dumps([*alike, getattr(spec.train, "objective", None)], sort_keys=True)
        if key not in self._rules:
            self._rules[key] = _rule(self._search, self._search.grace_steps or spec.train.eval_every or 1)
        rule = self._rules[key]
        if spec.trial_id not in self._added:
            self._added.add(spec.trial_id)
            rule.on_trial_add(None, _Trial(spec.trial_id))
        return rule


def _rule(search: SearchSpec, grace_steps: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    common: dict[str, Any] = {"time_attr": "step", "metric": LOSS, "mode": "min", "grace_period": grace_steps}
    if search.scheduler == "asha":
        # Trials end by themselves, so the rungs need no end.
        return ASHAScheduler(**common, max_t=10**9, reduction_factor=search.reduction, stop_last_trials=False)
    # With a time slice it would pause trials while few have reported, for which it needs Tune's loop.
    return MedianStoppingRule(**common, min_time_slice=cast(int, math.inf), hard_stop=False)


def _logged(path: Path) -> Iterator[dict[str, Any]]:
    """What a trial has logged; numbers that are not finite are texts. A line that is cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
