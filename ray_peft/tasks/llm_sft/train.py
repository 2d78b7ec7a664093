"""One stage of training a causal language model."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.contract import Share
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import RecordedPasses
from ray_peft.engine.row_dropout import RowDropout, row_dropout
from ray_peft.engine.trained import Trained
from ray_peft.engine.workers import this_worker
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.adapter_inputs import as_they_are
from ray_peft.methods.lora import LoRA
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.decodable import EIGHT_BITS, VIRTUAL_TOKENS
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedRows
from ray_peft.tasks.llm_sft.steps import TextPart, TextRows

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
        rows: the training rows, with columns input_ids and labels.
        model: with the stage attached.
        tokenizer: of the model.
        rehearse: try the pass that needs the most memory before the first step.
    """
    from transformers import set_seed

    set_seed(spec.seed)
    if isinstance(job.stage, LoRA | QLoRA):
        start_as_trl(spec, model)
    data = TextRows(spec, rows)
    pad = cast(int, tokenizer.pad_token_id)
    dropout, unkeyed = _dropout(spec, job, model, data, pad)
    if spec.train.gradient_checkpointing:
        recompute_activations(model, dropout, random=unkeyed is not None)
    plain = TextLoss(spec, model, pad, dropout)
    member = Member(job, model, data)
    with contextlib.nullcontext() if dropout is None else dropout.installed(), as_they_are(model):
        reason = why_not_packed(spec, job, model, data, plain, dropout, unkeyed)
        if reason is None:
            packed = PackedLoss(spec, model, dropout)
            Engine([member], model, PackedRows(data), packed, RecordedPasses, rehearse=rehearse).run()
        else:
            logger.info("%s: passes are not recorded: %s", spec.trial_id, reason)
            Engine([member], model, data, plain, rehearse=rehearse).run()
            member.trained.passes = f"as they are, since {reason}"
    if unkeyed is not None:
        member.trained.passes += f"; dropout is drawn by the pass: {unkeyed}"
    return member.trained


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
    data: TextRows,
    plain: TextLoss,
    dropout: RowDropout | None,
    unkeyed: str | None,
) -> str | None:
    """Why the passes of a stage cannot be packed and recorded; None if they can.

    Compares the loss of the largest pass of its first step both ways, so that a recorded trial has the losses that it
    would have otherwise: with the dropout that is drawn by the row, else without dropout.
    """
    import torch

    reason = _why_not_tried(spec, job, model, plain, unkeyed)
    if reason is not None:
        return reason
    # A second PackedRows: that of the training reuses its shapes, and the one tried here could then replace a smaller.
    part = PackedRows(data).heaviest(range(job.first_step, job.first_step + 1), this_worker(), 1)
    assert part is not None
    packed = PackedLoss(spec, model, dropout)
    rows = [row for lane in part.lanes for row in lane]
    ids, labels = zip(*rows, strict=True)
    keys = [key for lane in part.keys for key in lane]
    alone = TextPart(ids, labels, part.loss_tokens[0], 1, keys)
    model.train(dropout is not None)
    try:
        with torch.no_grad():
            padded_loss = float(plain.loss(*(value.to(job.device) for value in plain.inputs(alone))))
            packed_loss = float(packed.loss(*(value.to(job.device) for value in packed.inputs(part))))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a model's own code
        return f"it cannot compute several rows in one lane ({type(error).__name__})"
    if abs(padded_loss - packed_loss) > ROUNDING[spec.train.precision] * max(abs(padded_loss), 1e-3):
        return f"rows in lanes have another loss ({packed_loss:.6g}, not {padded_loss:.6g})"
    return None


def _why_not_tried(
    spec: LlmTrialSpec, job: Job, model: PreTrainedModel, plain: TextLoss, unkeyed: str | None
) -> str | None:
    """Why passes cannot be recorded by settings, method and architecture; None if these give no reason."""
    config = model.config.get_text_config()
    stage = job.stage
    if not job.device.startswith("cuda"):
        return "there is no GPU"
    if not spec.train.cuda_graphs:
        return "train.cuda_graphs is false"
    if getattr(model, "is_loaded_in_8bit", False):
        return EIGHT_BITS
    if stage.conflicts(accumulates=True, num_workers=1):
        return f"{stage.name} updates weights in the backward pass"
    if isinstance(stage, Adapter) and stage.trains_prompts:
        return VIRTUAL_TOKENS
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


def start_as_trl(spec: LlmTrialSpec, model: PreTrainedModel) -> None:
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
