"""Pairs and labelled rows of many lengths, and trials that learn from them by our loop and by TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

PAIRS = [
    {
        "prompt": f"Say {index}." + " Please." * (index % 5),
        "chosen": "word " * (index % 4 + 1) + str(index),
        "rejected": "no " * (index % 3 + 1) + str(index * 7),
    }
    for index in range(52)
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if index % 3 else "rejected"], "label": bool(index % 3)}
    for index, pair in enumerate(PAIRS)
]

Log = list[dict[str, float]]


def plain_spec(model: Path, rows: Path, method: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A trial of 12 steps of 8 pairs, 4 a pass, three quarters of whose rows are trained on."""
    objective = changes.pop("train__objective", "dpo")
    plain = tiny.plain_spec(
        model, rows, method, train__steps=12, train__micro_batch_size=4, train__objective=objective,
        evaluation__generate=False, **changes,
    )  # fmt: skip
    source = plain["data"]["sources"][0]
    source["recipe"] = "labelled" if "labelled" in rows.name else "preference"
    return plain


def trained(plain: dict[str, Any], folder: Path) -> tuple[Log, Any]:
    """What our loop logs, and the bench with the trained model."""
    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft

    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    log: Log = []
    done = 0
    stages = spec.method.stages(bench.total_steps())
    for index, (stage, steps) in enumerate(stages):
        bench.attach(stage)
        bench.train(
            stage, steps, done, folder / str(index), lambda metrics, step: log.append({"step": step, **metrics})
        )
        done += steps
        if index + 1 < len(stages):
            bench.merge(stage)
    return log, bench


def trained_by_trl(plain: dict[str, Any], folder: Path) -> tuple[Log, Any]:
    """What TRL's trainer of the same objective logs from the same start on the same tokens, and its model."""
    from transformers import set_seed

    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft
    from ray_peft.tasks.llm_sft.train import start_as_trl
    from ray_peft.tasks.llm_sft.trl_engine import _keep_adapter_dtype

    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    bench.attach(stage)
    start_as_trl(spec, bench.model)
    optimizer = stage.optimizer(bench.model)
    set_seed(spec.seed)
    train, settings = spec.train, spec.train.preference
    trainer_class, config, more = _trainer(spec)
    trainer = trainer_class(
        model=bench.model,
        args=config(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=spec.accumulation, learning_rate=stage.lr, weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm, lr_scheduler_type=train.schedule, gradient_checkpointing=False,
            bf16=False, use_cpu=True, seed=spec.seed, data_seed=spec.seed, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, max_length=None, beta=settings.beta,
            **more,
        ),
        train_dataset=_as_trl(bench, spec.train.objective),
        processing_class=bench.tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    _keep_adapter_dtype(stage, bench.model)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], bench.model


def _trainer(spec: Any) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's trainer, which takes rows as they are tokenised, its config, and settings of its own."""
    settings = spec.train.preference
    if spec.train.objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        base: Any = DPOTrainer
        config: Any = DPOConfig
        more: dict[str, Any] = {"loss_type": [settings.loss], "label_smoothing": settings.label_smoothing}
    elif spec.train.objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        base, config, more = ORPOTrainer, ORPOConfig, {}
    else:
        from trl import KTOConfig, KTOTrainer

        base, config = KTOTrainer, KTOConfig
        weights = ("desirable_weight", "undesirable_weight")
        more = {name: getattr(settings, name) for name in weights}

    class Tokenised(base):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Tokenised, config, more


def _as_trl(bench: Any, objective: str) -> Any:
    """The training rows in the columns of TRL's trainers: prompt and answers apart, nothing behind an answer."""
    from datasets import Dataset

    rows = []
    for row in bench.judged["train"]:
        sides = [_cut(row["input_ids"], row["labels"])]
        if "rejected_ids" in row:
            sides.append(_cut(row["rejected_ids"], row["rejected_labels"]))
        prompt = sides[0][0]
        assert all(other == prompt for other, _ in sides)
        entry = {"prompt_ids": prompt}
        if objective == "dpo":
            entry |= {"chosen_ids": sides[0][1], "rejected_ids": sides[1][1]}
        else:
            entry |= {"completion_ids": sides[0][1], "label": row["desirable"]}
        rows.append(entry)
    return Dataset.from_list(rows)


def _cut(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    scored = [place for place, label in enumerate(labels) if label != -100]
    return ids[: scored[0]], ids[scored[0] : scored[-1] + 1]
