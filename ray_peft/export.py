"""A trial's weights as a folder that transformers or PEFT reads, in another dtype, with the loss on both sides."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ray_peft.errors import SpecError
from ray_peft.foundation.whole import new_folder
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec
from ray_peft.store import tracking
from ray_peft.store.consent import check_consent
from ray_peft.tasks import TASKS
from ray_peft.tasks.one_model import ADAPTER_CONFIG
from ray_peft.trial.rounding import check_same_loss

Format = Literal["adapter", "merged", "gguf"]
SaveDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Exported:
    """The result of an export; also its `export.json`."""

    folder: str
    mlflow_run_id: str
    trial_id: str
    format: Format
    dtype: SaveDtype
    num_bytes: int
    """Of the weights."""
    eval_loss_before: float
    """On the held-out rows, of the model as the trial saved it."""
    eval_loss_after: float
    """The same of what was exported, loaded again."""


def export(
    run_id: str, *, form: Format, dtype: SaveDtype, out: str | Path | None = None, tracking_uri: str,
    trust_remote_code: bool = False,
) -> Exported:  # fmt: skip
    """Write the weights of a trial's MLflow run into a new folder.

    Args:
        run_id: the run of a finished trial.
        form: `adapter` as PEFT reads it; `merged`: the whole model, adapters added to the (dequantised) base; or
            `gguf`: the merged model as one file for llama.cpp.
        dtype: of the written weights.
        out: the folder; None is `exports/<trial id>-<form>-<dtype>`.
        tracking_uri: the MLflow store.
        trust_remote_code: run Python code that the run's spec trusts; without it such a run is refused.

    Raises:
        TrackingError: the run or its weights are missing.
        SpecError: the run has no weights in that form, or the folder exists.
        DataError, ModelError: the trial's data or base model is missing.
        TrialFailed: the written weights have another held-out loss, by more than rounding; the folder is removed.
    """
    spec = tracking.load_spec(tracking_uri, run_id)
    check_consent(spec, run_id, trust_remote_code=trust_remote_code)
    folder = Path(out) if out else Path("exports") / f"{spec.trial_id}-{form}-{dtype}"
    if folder.exists() and any(folder.iterdir()):
        raise SpecError(f"--out {folder}: exists and is not empty; give another folder, or remove it")
    if spec.members():
        ids = ", ".join(member.trial_id for member in spec.members())
        raise SpecError(f"run {run_id} is an ensemble, which has no weights of its own; export its members: {ids}")
    if spec.method.name == "none":
        raise SpecError(f"run {run_id} is the untouched base, which has no adapter and no weights of its own")
    if form != "adapter":
        for stage, _ in spec.method.stages(ENOUGH_STEPS):
            if (reason := stage.why_not_merged()) is not None:
                raise SpecError(f"run {run_id} ({spec.method.name}) cannot be merged: {reason}; use --format adapter")
    task = TASKS[spec.task]
    if form == "gguf":
        task.check_gguf(spec)
    task.inspect(spec)
    with tempfile.TemporaryDirectory(prefix="ray_peft_export_") as scratch:
        trained = tracking.fetch(tracking_uri, run_id, "adapter", Path(scratch))
        adapted = (trained / ADAPTER_CONFIG).is_file()
        if form == "adapter" and not adapted:
            raise SpecError(f"run {run_id} ({spec.method.name}) trained all weights and has no adapter; use merged")
        device = _device()
        loaded = task.load_trained(spec, trained, device)
        before = loaded.eval_loss()
        with new_folder(folder) as partial:
            whole = partial if form != "gguf" else Path(scratch) / "merged"
            whole.mkdir(exist_ok=True)
            _write(spec, trained, whole, merge=form != "adapter" and adapted, dtype=dtype, device=device)
            exported = task.load_trained(_with(spec, save=dtype), whole, device)
            after, size = exported.eval_loss(), exported.stored_bytes(whole)
            dtypes = {*loaded.dtypes(), *exported.dtypes(), dtype}
            check_same_loss(before, after, dtypes, f"writing {form} weights in {dtype}")
            if form == "gguf":
                file = partial / f"{spec.trial_id}-{dtype}.gguf"
                task.write_gguf(whole, file)
                size = file.stat().st_size
            summary = Exported(str(folder), run_id, spec.trial_id, form, dtype, size, before, after)
            (partial / "export.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _write(spec: TrialSpec, trained: Path, folder: Path, *, merge: bool, dtype: SaveDtype, device: str) -> None:
    # Merged in float32, so that the sum of base and adapter is rounded once, when it is saved.
    bench = TASKS[spec.task].load_trained(_with(spec, base="float32") if merge else spec, trained, device)
    if merge:
        stage, _ = spec.method.stages(bench.total_steps())[-1]
        bench.merge(stage)
    if merge or not (trained / ADAPTER_CONFIG).is_file():
        bench.export(folder, dtype)
    else:
        bench.save(folder, dtype)


def _with(spec: TrialSpec, *, save: SaveDtype | None = None, base: SaveDtype | None = None) -> TrialSpec:
    """The spec with another dtype of saved weights, or of the base."""
    plain = spec.plain()
    if save is not None:
        plain["train"]["save_dtype"] = save
    if base is not None:
        plain["model"]["dtype"] = base
    return TrialSpec.from_plain(plain)


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
