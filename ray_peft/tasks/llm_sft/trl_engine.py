"""One stage on TRL's SFTTrainer itself, for people who want the stock path: `train.engine: trl`.

It does not go on with fewer rows when memory runs out, and does not try the largest pass first.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.due import Due
from ray_peft.engine.finite import FiniteGuard
from ray_peft.engine.member import Job
from ray_peft.engine.trained import Trained
from ray_peft.methods.base import Stage
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.steps import TextRows
from ray_peft.tasks.llm_sft.trl_checkpoints import Meter, last_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_rows(spec: LlmTrialSpec, rows: Dataset) -> Dataset:
    """The training rows with the labels of the spec's loss."""
    columns = rows.select_columns(["input_ids", "labels"])
    if spec.train.loss == "all":
        return columns.map(lambda row: {"labels": row["input_ids"]}, keep_in_memory=True)
    return columns


def _rows_of_later_stage(spec: LlmTrialSpec, rows: Dataset, job: Job, filler: int) -> tuple[Dataset, int]:
    """The stage's rows in order, from where the previous stage ended; and how many of them are fillers.

    The last batch of an epoch may hold fewer rows: rows of one token without loss fill it up.
    """
    from datasets import Dataset, concatenate_datasets

    data, batch = TextRows(spec, rows), spec.train.batch_size
    order: list[int] = []
    for step in range(job.first_step, job.first_step + job.steps):
        places = data.places(step)
        order += places + [len(rows)] * (batch - len(places))
    empty = Dataset.from_dict({"input_ids": [[filler]], "labels": [[IGNORED]]}, features=rows.features)
    return concatenate_datasets([rows, empty]).select(order), order.count(len(rows))


def train_stage(
    spec: LlmTrialSpec, job: Job, rows: Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trained:
    """Train `model` in place for the stage's steps; goes on from the last checkpoint where there is one."""
    from transformers.trainer_callback import PrinterCallback

    trained = Trained()
    optimizer = job.stage.optimizer(model)
    guard = FiniteGuard(spec, job.stage, job.first_step)
    rows = train_rows(spec, rows)
    fillers = 0
    if job.first_step:
        rows, fillers = _rows_of_later_stage(spec, rows, job, cast(int, tokenizer.pad_token_id))
    trainer = _guarded_trainer(guard, optimizer)(
        model=model,
        args=_arguments(spec, job),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    _keep_adapter_dtype(job.stage, model)
    meter = Meter(trained, trainer, job.costs)
    trainer.add_callback(_watcher(spec, job, trained, guard, meter))
    checkpoint = last_checkpoint(job.folder)
    meter.start(checkpoint, job.first_step)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    guard.check()
    total = meter.so_far()
    trainer.accelerator.free_memory()
    return replace(total, tokens=total.tokens - fillers)


def _arguments(spec: LlmTrialSpec, job: Job) -> Any:
    from trl import SFTConfig  # type: ignore[attr-defined]  # not in __all__

    train = spec.train
    warmup = train.warmup_steps or train.warmup_ratio
    return SFTConfig(
        output_dir=str(job.folder),
        max_steps=job.steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=job.stage.lr,
        weight_decay=job.stage.weight_decay,
        max_grad_norm=job.stage.max_grad_norm or 0.0,
        lr_scheduler_type=train.schedule if train.schedule != "constant" or not warmup else "constant_with_warmup",
        warmup_steps=warmup,
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=train.precision == "bf16",
        use_cpu=job.device == "cpu",
        seed=spec.seed,
        data_seed=spec.seed,
        train_sampling_strategy="sequential" if job.first_step else "random",
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the watcher decides when, and removes older ones once a new one is complete
        max_length=None,
        packing=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=job.device != "cpu",
        ddp_find_unused_parameters=False,
        optim="adamw_torch",
    )


def _keep_adapter_dtype(stage: Stage, model: PreTrainedModel) -> None:
    """Undo SFTTrainer's cast of adapters on a quantised base to bf16 (TRL 1.16): they keep the method's dtype."""
    dtype = getattr(stage, "adapter_dtype", None)
    if dtype is None:
        return
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def _guarded_trainer(guard: FiniteGuard, optimizer: Optimizer) -> Any:
    """A trainer that shows every step's loss and gradient norm to `guard`, before the optimizer uses them."""
    from trl import SFTTrainer  # type: ignore[attr-defined]  # not in __all__

    class GuardedTrainer(SFTTrainer):
        # The only place in transformers 5.23 that has both numbers in every step; callbacks get them only when logged.
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
            # A layer-wise optimizer has freed the gradients by now; `worst` is NaN if one of them was not finite.
            guard.see(self.state.global_step + 1, self._tr_loss, norm + getattr(optimizer, "worst", 0.0))
            return norm

    return GuardedTrainer


def _watcher(spec: LlmTrialSpec, job: Job, trained: Trained, guard: FiniteGuard, meter: Meter) -> Any:
    """A TrainerCallback that reports logged metrics, measures the held-out loss, and completes checkpoints."""
    from transformers import TrainerCallback

    due = Due(spec.train.checkpoint_every, job.device)

    class Watcher(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            logs: dict[str, Any] = keywords["logs"]
            if "loss" not in logs:
                return
            guard.check()
            trained.losses.append(float(logs["loss"]))
            logged = {
                "train_loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "epoch": logs.get("epoch"),
            }
            metrics = {name: float(value) for name, value in logged.items() if value is not None}
            job.report(metrics, job.first_step + state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            logged = step == 1 or step % spec.train.log_every == 0
            if due.after(step, job.steps, logged=logged):
                guard.check()
                control.should_save = True
            every = spec.train.eval_every
            if every and state.global_step % every == 0 and state.global_step < job.steps:
                begin = time.perf_counter()
                loss = job.evaluate()
                trained.seconds -= time.perf_counter() - begin
                trained.eval_losses.append(loss)
                job.report({"eval_loss": loss}, job.first_step + state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                meter.keep(job.folder)
            trained.seconds -= due.written()

    return Watcher()
