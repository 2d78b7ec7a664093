"""One stage of training a causal language model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.contract import Computation, Rows, Share
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import RecordedPasses
from ray_peft.engine.row_dropout import RowDropout, row_dropout
from ray_peft.engine.shards import is_sharded
from ray_peft.engine.trained import Trained
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.adapter_inputs import as_they_are
from ray_peft.methods.lora import LoRA
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.decodable import never_recorded
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedRows
from ray_peft.tasks.llm_sft.preference.packed import PackedPreferenceLoss, PackedPreferenceRows
from ray_peft.tasks.llm_sft.preference.padded import PreferenceLoss
from ray_peft.tasks.llm_sft.preference.steps import PreferenceRows
from ray_peft.tasks.llm_sft.steps import TextRows

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def train_stage(
    spec: LlmTrialSpec,
    job: Job,
    rows: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rehearse: bool = False,
) -> Trained:
    """Train `model` in place for the stage's steps; goes on from the last checkpoint where there is one.

    Args:
        spec: the trial.
        job: its stage.
        rows: the training rows, with columns input_ids and labels, and those that `PreferenceRows` needs.
        model: with the stage attached.
        tokenizer: of the model.
        rehearse: try the pass that needs the most memory before the first step.
    """
    from transformers import set_seed

    set_seed(spec.seed)
    if isinstance(job.stage, LoRA | QLoRA):
        start_as_trl(model)
    pad = cast(int, tokenizer.pad_token_id)
    dropout, unkeyed = _dropout(spec, job, model, TextRows(spec, rows), pad)
    if spec.train.gradient_checkpointing:
        recompute_activations(model, dropout, random=unkeyed is not None)
    work = work_of(spec, rows, model, pad, dropout)
    member = Member(job, model, work.rows)
    with contextlib.nullcontext() if dropout is None else dropout.installed(), as_they_are(model):
        reason = why_not_packed(spec, job, model, work, dropout, unkeyed)
        if reason is None:
            packed: Any = work.packed()
            Engine([member], model, work.packed_rows(), packed, RecordedPasses, rehearse=rehearse).run()
        else:
            logger.info("%s: passes are not recorded: %s", spec.trial_id, reason)
            plain: Any = work.plain
            Engine([member], model, work.rows, plain, rehearse=rehearse).run()
            member.trained.passes = f"as they are, since {reason}"
    if unkeyed is not None:
        member.trained.passes += f"; dropout is drawn by the pass: {unkeyed}"
    return member.trained


@dataclass(frozen=True)
class Work:
    """What the steps of a trial see and compute, as they are and packed."""

    rows: Rows[Any]
    plain: TextLoss | PreferenceLoss
    packed_rows: Callable[[], PackedRows | PackedPreferenceRows]
    """A new one each time: each reuses the shapes that it has given, so that one that was tried may give others."""
    packed: Callable[[], PackedLoss | PackedPreferenceLoss]


def work_of(spec: LlmTrialSpec, rows: Dataset, model: PreTrainedModel, pad: int, dropout: RowDropout | None) -> Work:
    """The rows and the loss of a trial's objective."""
    if spec.train.objective == "sft":
        data = TextRows(spec, rows)
        plain = TextLoss(spec, model, pad, dropout)
        return Work(data, plain, lambda: PackedRows(data), lambda: PackedLoss(spec, model, dropout))
    judged = PreferenceRows(spec, rows)
    return Work(
        judged,
        PreferenceLoss(spec, model, pad, dropout),
        lambda: PackedPreferenceRows(judged),
        lambda: PackedPreferenceLoss(spec, model, dropout),
    )


def _dropout(
    spec: LlmTrialSpec, job: Job, model: PreTrainedModel, data: TextRows, pad: int
) -> tuple[RowDropout | None, str | None]:
    """The dropout that is drawn by the row, tried on the stage's first row with loss; or the reason why it is not."""
    rows = data.parts(job.first_step, Share(), 1)
    part = next((row for row in rows if any(label != IGNORED for label in row.labels[0][1:])), rows[0])

    def loss(dropout: RowDropout) -> Tensor:
        computation = TextLoss(spec, model, pad, dropout)
        return computation.loss(*(value.to(job.device) for value in computation.inputs(part)))

    return row_dropout(model, job.device, loss)


def why_not_packed(
    spec: LlmTrialSpec,
    job: Job,
    model: PreTrainedModel,
    work: Work,
    dropout: RowDropout | None,
    unkeyed: str | None,
) -> str | None:
    """Why the passes of a stage cannot be packed and recorded; None if they can.

    Compares the largest pass of its first step both ways, so that a recorded trial has the losses that it would have
    otherwise: with the dropout that is drawn by the row, else without dropout.
    """
    if is_sharded(model):
        return "its weights are spread over workers (resources.strategy: fsdp)"
    reason = _why_not_tried(spec, job, model, work.plain, unkeyed)
    if reason is not None:
        return reason
    part: Any = work.packed_rows().heaviest(range(job.first_step, job.first_step + 1), 1)
    assert part is not None
    model.train(dropout is not None)
    return why_unlike(spec, job.device, (work.plain, part.unpacked()), (work.packed(), part))


def why_unlike(
    spec: LlmTrialSpec, device: str, padded: tuple[Computation[Any], Any], packed: tuple[Computation[Any], Any]
) -> str | None:
    """Why padded and packed rows, each with what computes them, are not the same to a model; None if they are."""
    import torch

    try:
        with torch.no_grad():
            padded_loss, packed_loss = (
                float(computation.compared(*(value.to(device) for value in computation.inputs(rows))))
                for computation, rows in (padded, packed)
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a model's own code
        return f"it cannot compute several rows in one lane ({type(error).__name__})"
    if not abs(padded_loss - packed_loss) <= ROUNDING[spec.train.precision] * max(abs(padded_loss), 1e-3):  # or NaN
        return f"rows in lanes have another loss ({packed_loss:.6g}, not {padded_loss:.6g})"
    return None


def _why_not_tried(
    spec: LlmTrialSpec, job: Job, model: PreTrainedModel, plain: TextLoss | PreferenceLoss, unkeyed: str | None
) -> str | None:
    """Why passes cannot be recorded by settings, method and architecture; None if these give no reason."""
    config = model.config.get_text_config()
    stage = job.stage
    if not job.device.startswith("cuda"):
        return "there is no GPU"
    if not spec.train.cuda_graphs:
        return "train.cuda_graphs is false"
    if (reason := never_recorded(model) or stage.why_not_recorded()) is not None:
        return reason
    if isinstance(stage, Adapter) and not isinstance(stage, LoRA | QLoRA) and unkeyed is not None:
        return "a recording would repeat what its adapter draws"
    if spec.train.gradient_checkpointing and unkeyed is not None:
        return "gradient checkpointing would have to draw its dropout again"
    if plain.balances:
        return "it is a mixture of experts, where a row's path depends on its content"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation}"
    return None


ROUNDING = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest allowed relative difference of the loss between padded rows and rows in lanes, by precision."""


def start_as_trl(model: PreTrainedModel) -> None:
    """Round new adapters on a quantised base to bf16 once, as TRL's SFTTrainer does, and keep their dtype.

    So a trial begins with the same numbers as under that trainer, and can be compared with earlier results.
    """
    import torch

    if getattr(model, "is_loaded_in_4bit", False) and hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)


def recompute_activations(model: Any, dropout: RowDropout | None, *, random: bool) -> None:
    """Recompute activations in the backward pass; with `random`, the random state is restored for that."""
    contexts = {} if dropout is None else {"context_fn": dropout.contexts}
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": random, **contexts})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
