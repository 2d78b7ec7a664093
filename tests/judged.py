"""Pairs and labelled rows of many lengths, and trials that learn from them by our loop and by TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from ray_peft.tasks.llm_sft.steps import StepOrder

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

Log = list[dict[str, Any]]


def plain_spec(model: Path, rows: Path, method: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A trial of 8 steps of 8 pairs, 4 a pass, three quarters of whose rows are trained on."""
    objective = changes.pop("train__objective", "dpo")
    sizes = {"train__steps": 8, "train__micro_batch_size": 4, "evaluation__generate": False}
    plain = tiny.plain_spec(model, rows, method, train__objective=objective, **sizes | changes)
    source = plain["data"]["sources"][0]
    source["recipe"] = "labelled" if "labelled" in rows.name else "preference"
    return plain


def trained(plain: dict[str, Any], folder: Path, device: str = "cpu") -> tuple[Log, Any]:
    """What our loop logs, how passes ran included in its last line, and the bench with the trained model."""
    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft

    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, device)
    log: Log = []
    done = 0
    stages = spec.method.stages(bench.total_steps())
    for index, (stage, steps) in enumerate(stages):
        bench.attach(stage)
        outcome = bench.train(
            stage, steps, done, folder / str(index), lambda metrics, step: log.append({"step": step, **metrics})
        )
        log[-1]["passes"] = outcome.passes
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
    start_as_trl(bench.model)
    optimizer = stage.optimizer(bench.model)
    set_seed(spec.seed)
    train, settings = spec.train, spec.train.preference
    data = bench.judged.get("train", bench.data.train)
    trainer_class, config, more = _trainer(spec, max(map(len, data["input_ids"])))
    trainer = trainer_class(
        model=bench.model,
        args=config(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=spec.accumulation, learning_rate=stage.lr, weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm, lr_scheduler_type=train.schedule, gradient_checkpointing=False,
            bf16=False, use_cpu=True, seed=spec.seed, data_seed=spec.seed, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, beta=settings.beta,
            **more,
        ),
        train_dataset=_as_trl(bench, spec.train.objective),
        processing_class=bench.tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    _keep_adapter_dtype(stage, bench.model)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], bench.model


def _trainer(spec: Any, longest: int) -> tuple[Any, Any, dict[str, Any]]:
    """TRL's trainer, which takes rows as they are tokenised, its config, and settings of its own."""
    settings = spec.train.preference
    if spec.train.objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        base: Any = DPOTrainer
        config: Any = DPOConfig
        more: dict[str, Any] = {"loss_type": [settings.loss], "label_smoothing": settings.label_smoothing}
        more["max_length"] = None
    elif spec.train.objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        base, config, more = ORPOTrainer, ORPOConfig, {"max_length": None}
    else:
        from trl import KTOConfig, KTOTrainer

        base, config = KTOTrainer, KTOConfig
        weights = ("desirable_weight", "undesirable_weight")
        more = {name: getattr(settings, name) for name in weights} | {"max_length": longest}

    class Tokenised(base):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return {name: feature[f"kept_{name}"] for name in ORPO_COLUMNS}

    return Tokenised, config, more


ORPO_COLUMNS = [
    f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("input_ids", "attention_mask", "labels")
] + ["prompt_input_ids", "prompt_attention_mask"]


def _as_trl(bench: Any, objective: str) -> Any:
    """The training rows in the columns of TRL's trainers: prompt and answers apart, nothing behind an answer."""
    from datasets import Dataset

    data = bench.judged.get("train", bench.data.train)
    if objective == "orpo":
        return Dataset.from_list([_orpo_row(row) for row in data])
    rows: list[dict[str, Any]] = []
    for row in data:
        prompt, chosen = _cut(row["input_ids"], row["labels"])
        if objective == "kto":
            rows.append({"prompt_ids": prompt, "completion_ids": chosen, "label": row["desirable"]})
            continue
        other, rejected = _cut(row["rejected_ids"], row["rejected_labels"])
        assert other == prompt
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if objective == "kto":  # its rows must come in order, and the answers of other rows with them
        order = StepOrder(bench.spec, len(rows))
        places = [place for step in range(bench.spec.train.steps) for place in order.places(step)]
        rows = [rows[place] | {"KL_completion_ids": rows[place - 1]["completion_ids"]} for place in places]
    return Dataset.from_list(rows)


def _orpo_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns that ORPOTrainer makes of it, and the texts that it asks for."""
    entry = {"prompt": "p", "chosen": "c", "rejected": "r"}
    prompt, _ = _cut(row["input_ids"], row["labels"])
    sides = {"prompt": (prompt, []), "chosen": (row["input_ids"], row["labels"])}
    sides["rejected"] = row["rejected_ids"], row["rejected_labels"]
    for side, (ids, labels) in sides.items():
        entry |= {f"kept_{side}_input_ids": ids, f"kept_{side}_attention_mask": [1] * len(ids)}
        entry |= {f"kept_{side}_labels": labels} if labels else {}
    return entry


def _cut(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    scored = [place for place, label in enumerate(labels) if label != -100]
    return ids[: scored[0]], ids[scored[0] : scored[-1] + 1]
