"""One stage of training a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.trained import Trained
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.steps import TextRows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        rehearse: try the pass that needs the most memory before the first steps.
    """
    from transformers import set_seed

    set_seed(spec.seed)
    _start_as_trl(spec, model)
    if spec.train.gradient_checkpointing:
        _recompute_activations(model)
    computation = TextLoss(spec, model, cast(int, tokenizer.pad_token_id))
    return Engine(Member(job, model), model, TextRows(spec, rows), computation, rehearse=rehearse).run()


def _start_as_trl(spec: LlmTrialSpec, model: PreTrainedModel) -> None:
    """Round new adapters on a quantised base to bf16 once, as TRL's SFTTrainer does; they keep their own dtype.

    So a trial begins where it began under that trainer, and earlier results compare.
    """
    import torch

    if getattr(model, "is_loaded_in_4bit", False) and hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)


def _recompute_activations(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()
