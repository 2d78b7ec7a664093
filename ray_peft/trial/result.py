"""What one trial leaves behind: scores, usage, curve and provenance; failed trials too."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from ray_peft.foundation.measured import Measured
from ray_peft.foundation.names import PathPart
from ray_peft.foundation.strict import Strict
from ray_peft.metrics.scores import Scores
from ray_peft.spec import AnyTrialSpec

Status = Literal["finished", "stopped_early", "failed", "out_of_memory", "cancelled"]
"""`stopped_early`: `search.scheduler` ended it, since others had lower held-out losses."""

DONE: frozenset[Status] = frozenset({"finished", "stopped_early"})
"""Of trials that ended as they should."""

RESULT_FILE = "result.json"
"""The trial's row, in its own folder: written by its worker, and there also if nothing else could be reached."""
RESTARTS_FILE = "restarts.json"
"""Beside it, until the trial starts in another sweep: the row's `restarts` so far."""


class Usage(Measured):
    """What the trial cost. GiB = 2**30 bytes; the training phase alone unless a field says otherwise."""

    peak_allocated_gib: float | None = None
    """Peak of tensors on one GPU, reset after loading; None on a CPU."""
    peak_reserved_gib: float | None = None
    """Peak of the allocator's segments on one GPU; None on a CPU."""
    evaluation_allocated_gib: float | None = None
    """Peak of tensors on one GPU while the trial is scored and makes samples; None on a CPU."""
    device_used_gib: float | None = None
    """Peak in use on the whole GPU by all processes, from NVML; None on a CPU."""
    spilled_gib: float | None = None
    """Reserved memory beyond what the GPU has, which lies in the host's memory and is slow; None on a CPU."""
    peak_rss_gib: float | None = None
    """Peak resident memory of the worker process."""
    wall_time_s: float = 0.0
    """The whole trial, from load to save, over all its attempts."""
    load_s: float = 0.0
    train_s: float = 0.0
    evaluate_s: float = 0.0
    save_s: float = 0.0
    tokens_per_s: float | None = None
    """Real tokens (no padding) through training forward passes, per second, over all workers."""
    steps_per_s: float | None = None
    """Optimizer steps per second of training."""
    images_per_s: float | None = None
    """Images through training forward passes, per second, over all workers."""
    train_tokens: int = 0
    """Real tokens seen in training."""
    train_images: int = 0
    """Images seen in training, each as often as it was seen."""
    complete: bool = True
    """False for a trial that went on from a checkpoint of version 0.1.0, which does not say what came before it:
    seconds, tokens and peaks are then those after it."""


class Provenance(Strict):
    """Where and with what the result was made."""

    versions: dict[str, str] = {}
    """Package versions, and the Python's."""
    device: str = "cpu"
    """The GPU's name, or the CPU's."""
    num_workers: int = 1
    gpus_per_worker: float = 0.0
    hostname: str = ""
    git_commit: str | None = None
    """Commit of the working tree, with "+dirty" if it had changes; None outside a repository."""
    model_fingerprint: str | None = None
    """SHA-256 of the model's config and weight index, or its hub commit."""
    data_key: str | None = None
    """Content hash of the prepared rows."""
    gpu: str | None = None
    """Number or UUID of the GPU that rank 0 used, as the machine counts them; None on a CPU, and in rows of versions up
    to 0.2.0."""
    started_at: str = ""
    """Start of the trial's last attempt; ISO 8601, UTC."""
    ended_at: str = ""
    """Its end; empty in rows of versions up to 0.2.0."""


class TrialResult(Measured):
    """One row of a comparison."""

    trial_id: PathPart
    status: Status
    spec: AnyTrialSpec
    scores: Scores = Scores()
    usage: Usage = Usage()
    train_loss_final: float | None = None
    """Mean training loss over the last logged steps."""
    eval_loss_best: float | None = None
    """Lowest held-out loss of the trial's evaluations."""
    boundary_losses: dict[str, float] = {}
    """Held-out loss between the stages of a method that has several: what a merge costs is a number."""
    steps: int = 0
    """Optimizer steps done."""
    resumed_from_step: int | None = None
    """The step at which the trial's last attempt resumed; None if there was one attempt. `usage` adds up over the
    attempts, without what was done twice."""
    restarts: list[str] = []
    """Why its earlier attempts in the same sweep ended, one line each: their workers died."""
    passes: str = ""
    """How its training ran forward and backward passes: recorded, or why not."""
    arithmetic: str = ""
    """How the trained weights are held and updated, such as "bfloat16 weights, stochastic rounding"."""
    pack_size: int = 1
    """Trials that trained together with it on one base, itself included. Of more than one, its peaks are those of all,
    its seconds of loading an equal share, and its seconds of training a share by the tokens of its steps."""
    members: dict[PathPart, float] = {}
    """Of an ensemble, the weight of each member by its trial id; they add up to one."""
    chosen: dict[str, int | bool] = {}
    """Settings that `train.fit: auto` chose for the GPU at hand, by key. In fp32 no number of the trial depends on
    them; in bf16 the last digits do."""
    lowered: dict[str, int] = {}
    """Settings that were lowered because memory ran out, by key. In fp32 no number of the trial depends on them;
    in bf16 the last digits do, and an answer may turn at a near tie of two tokens."""
    predicted: dict[str, float] = {}
    """Peak memory as predicted before it ran [GiB]: peak_allocated_gib, peak_reserved_gib, and its components."""
    predicted_s: dict[str, float] = {}
    """Seconds as predicted before it ran, from what was measured of its shape: step_s, evaluate_s and wall_time_s;
    empty where nothing was."""
    trainable_parameters: int = 0
    total_parameters: int = 0
    adapter_bytes: int = 0
    """Bytes on disk of what was trained: the adapter, or the full weights."""
    storage: dict[str, int] = {}
    """Bytes of the base's weights in memory by how they are held, such as "nf4" and "bfloat16"."""
    four_bit_share: float | None = None
    """Share of the base's weights that are in 4 bits; None where none is meant to be, or where it was not counted."""
    mlflow_run_id: str | None = None
    untracked: str | None = None
    """Why the tracking store lacks this result; None if it has it."""
    error: str | None = None
    """Why a trial that is not finished ended; one line first, details below."""
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _spec_under_its_id(self) -> Self:
        """A spec that was read from a file takes the row's id: its own would stand for names, not for their content."""
        settled = self.spec.__dict__
        if settled.get("trial_id") != self.trial_id or (self.members and not settled.get("_member_ids")):
            object.__setattr__(self, "spec", self.spec.under(self.trial_id, tuple(self.members)))
        return self

    def row(self) -> dict[str, Any]:
        """The line of `results.jsonl`."""
        return self.plain()
