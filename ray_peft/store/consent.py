"""A trial of a tracking store that runs foreign Python code: the user must allow that again on this machine."""

from __future__ import annotations

from ray_peft.errors import SpecError
from ray_peft.spec import LlmTrialSpec, TrialSpec


def check_consent(spec: TrialSpec, run_id: str, *, trust_remote_code: bool) -> None:
    """Refuse the spec of a run that trusts code, unless the caller does.

    Raises:
        SpecError: it would run code of a model's repository, or code that its benchmarks bring or let the model write.
    """
    if trust_remote_code:
        return
    trusted = sorted({trial.model.name for trial in (spec, *spec.members()) if trial.model.trust_remote_code})
    trusting = [f"model.trust_remote_code: true, for {', '.join(trusted)}"] if trusted else []
    benchmarks = spec.evaluation.benchmarks if isinstance(spec, LlmTrialSpec) else None
    if benchmarks is not None and benchmarks.allow_code_execution:
        trusting.append("evaluation.benchmarks.allow_code_execution: true")
    if isinstance(spec, LlmTrialSpec) and spec.evaluation.metrics:
        trusting.append(f"evaluation.metrics: {', '.join(spec.evaluation.metrics)}")
    if trusting:
        raise SpecError(
            f"run {run_id} says {' and '.join(trusting)}: Python code from there would run on this machine; look at "
            "it, then give --trust-remote-code"
        )
