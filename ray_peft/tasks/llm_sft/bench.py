"""One trial of `llm_sft` on one device: its model, tokenizer and rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.trained import Report, Trained
from ray_peft.methods.base import Dtype, Stage
from ray_peft.metrics.scores import RowReward
from ray_peft.spec import LlmTrialSpec
from ray_peft.spec.preference import PAIRED_OBJECTIVES
from ray_peft.tasks.base import Scored, Workload
from ray_peft.tasks.llm_sft.general_text import GENERAL_TOKENS
from ray_peft.tasks.one_model import OneModelBench
from ray_peft.tasks.parameters import weight_storage
from ray_peft.vram.cards import Gpu, here

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.data import PreparedData
    from ray_peft.tasks.llm_sft.scores import Outputs
    from ray_peft.vram import Prediction


def trained_lengths(spec: LlmTrialSpec, rows: Dataset) -> list[tuple[int, ...]]:
    """Tokens of every training row: of both sides if the objective compares them."""
    from ray_peft.tasks.llm_sft.preference.rows import side_columns

    columns = [ids for ids, _ in side_columns(rows)]
    used = columns if spec.train.objective in PAIRED_OBJECTIVES else columns[:1]
    return list(zip(*(map(len, rows[ids]) for ids in used), strict=True))


def predictor(spec: LlmTrialSpec, rows: PreparedData) -> Callable[[LlmTrialSpec, Gpu], Prediction]:
    """Predicts a trial's peak memory, with passes as long as the longest rows that it trains on, and that it scores."""
    from ray_peft.tasks.llm_sft.grown import grown_config
    from ray_peft.tasks.llm_sft.lanes import largest_capacity
    from ray_peft.tasks.llm_sft.memory import predict
    from ray_peft.tasks.llm_sft.model import load_config
    from ray_peft.vram import ModelShape

    shape = ModelShape.from_config(grown_config(spec.model, load_config(spec.model)))
    lengths = set(trained_lengths(spec, rows.train))  # it is walked over in every call, and many rows are equally long
    trained, scored = max(map(max, lengths)), rows.facts.longest

    def of(variant: LlmTrialSpec, gpu: Gpu) -> Prediction:
        limit = variant.data.max_length
        longest, longest_scored = min(trained, limit), min(scored, limit)
        if variant.train.cuda_graphs:  # both sides of a pair lie in one lane
            longest = largest_capacity(max(sum(min(side, limit) for side in sides) for sides in lengths))
        return predict(variant, shape, longest_tokens=longest, longest_scored=longest_scored, gpu=gpu)

    return of


def total_steps(spec: LlmTrialSpec, train_rows: int) -> int:
    """Optimizer steps of a whole trial; the last one of an epoch may hold fewer rows."""
    if spec.train.steps is not None:
        return spec.train.steps
    assert spec.train.epochs is not None
    return max(1, math.ceil(spec.train.epochs * math.ceil(train_rows / spec.train.batch_size)))


def workload(spec: LlmTrialSpec, rows: PreparedData) -> Workload:
    """The mean length of its training rows, and the held-out rows that it scores and answers.

    Of labelled rows those with a desirable answer are scored. A general text counts as the rows that it would make.
    """
    from ray_peft.tasks.llm_sft.preference.rows import desirable_rows
    from ray_peft.tasks.llm_sft.scores import answered_rows

    held_out = desirable_rows(rows.held_out(spec.evaluation.split))
    row_tokens = sum(map(sum, trained_lengths(spec, rows.train))) / len(rows.train)
    general = round(GENERAL_TOKENS / row_tokens) if spec.evaluation.general_text else 0
    return Workload(row_tokens, len(held_out) + general, len(answered_rows(spec, held_out)))


class LlmBench(OneModelBench[LlmTrialSpec]):
    """A causal language model, its tokenizer and its rows."""

    model: PreTrainedModel
    judged: dict[str, Dataset]
    """By split, pairs or labelled rows with what the model said of them before training (`add_reference`)."""
    counted: tuple[int, int] | None = None
    """`parameters`, where the model's own no longer tell: those of 4-bit layers that are spread over workers."""
    outputs: Outputs | None = None
    """Of the trained model on the held-out rows, once they were computed together with those of other trials."""

    def __init__(
        self,
        spec: LlmTrialSpec,
        device: str,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        model: PreTrainedModel,
    ) -> None:
        from ray_peft.tasks.llm_sft.model import fingerprint

        self.spec = spec
        self.device = device
        self.tokenizer = tokenizer
        self.data = data
        self.model = model
        self.weight_storage = weight_storage(model)
        self.lowered = {}
        self.judged: dict[str, Dataset] = {}
        self.data_key = data.key
        self.model_fingerprint = fingerprint(spec.model)

    def add_reference(self) -> None:
        """Note what the model, before anything is attached, says of rows with a judgement."""
        from ray_peft.tasks.llm_sft.preference.reference import with_reference

        pad = cast(int, self.tokenizer.pad_token_id)
        self.judged = with_reference(self.spec, self.model, self.data, pad, self.lowered)

    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return total_steps(self.spec, len(self.data.train))

    def predicted(self) -> Prediction:
        """The peak with passes as long as the longest training row, on the GPU that is here."""
        return predictor(self.spec, self.data)(self.spec, here(self.device))

    def workload(self) -> Workload:
        """Of its rows."""
        return workload(self.spec, self.data)

    def attach(self, stage: Stage) -> None:
        """Prepare the model for a stage, from the trial's seed."""
        from transformers import set_seed

        set_seed(self.spec.seed)
        self.model = cast("PreTrainedModel", stage.attach(self.model))
        if self.spec.sharded:
            self.spread()

    def spread(self) -> None:
        """Spread the model over the trial's workers, which from then on pass the same rows."""
        from ray_peft.engine.shards import shard
        from ray_peft.tasks.four_bit_layers import as_plain_parameters

        self.counted = super().parameters()
        if self.spec.quantization is not None:
            as_plain_parameters(self.model, self.device)
        shard(self.model, self.device, of=self.spec.model.name)

    def parameters(self) -> tuple[int, int]:
        """Parameters that take gradients, and all parameters of the model."""
        return self.counted or super().parameters()

    @property
    def shared(self) -> bool:
        """Whether its model is spread over workers."""
        return self.spec.sharded

    def follow(self, *, saves: bool) -> None:
        """Take part in what rank 0 saves and scores."""
        from ray_peft.tasks.llm_sft.model import whole_weights

        if saves:
            whole_weights(self.model, self.spec.train.save_dtype, keep=False)
        self.compute_outputs()

    def train(self, stage: Stage, steps: int, first_step: int, folder: Path, report: Report) -> Trained:
        """Train the attached stage."""
        from ray_peft.engine.member import Job
        from ray_peft.tasks.llm_sft import train, trl_engine
        from ray_peft.tasks.llm_sft.routers import setting_restored

        job = Job(
            self.spec, stage, steps, first_step, folder, self.device, report, self.eval_loss,
            lowered=self.lowered, costs=self.costs,
        )  # fmt: skip
        arguments = (self.spec, job, self.judged.get("train", self.data.train), self.model, self.tokenizer)
        if self.spec.train.engine == "trl":
            with setting_restored(self.model):
                return trl_engine.train_stage(*arguments)
        return train.train_stage(*arguments, rehearse=self.device != "cpu")

    @property
    def scored_rows(self) -> Dataset:
        """The held-out rows that the trial is scored on; of labelled ones those with a desirable answer."""
        from ray_peft.tasks.llm_sft.preference.rows import desirable_rows

        return desirable_rows(self.data.held_out(self.spec.evaluation.split))

    def eval_loss(self) -> float:
        """Mean loss of the held-out answers' tokens [nats]."""
        return -float(self.answer_log_probs().mean())

    def answer_log_probs(self) -> Tensor:
        """Log-probabilities of all held-out answers' tokens (answer tokens,), the longest row first."""
        return self.log_probs(self.scored_rows)

    def log_probs(self, rows: Dataset) -> Tensor:
        """The same of any rows with `input_ids` and `labels`."""
        from ray_peft.tasks.llm_sft.evaluate import token_log_probs

        pad = cast(int, self.tokenizer.pad_token_id)
        return token_log_probs(self.spec, self.model, rows, pad, self.lowered)

    def general_loss(self) -> float | None:
        """Mean loss of a fixed general text's tokens [nats]; None if it is not asked for."""
        if not self.spec.evaluation.general_text:
            return None
        from ray_peft.tasks.llm_sft.general_text import general_rows

        return -float(self.log_probs(general_rows(self.tokenizer, self.spec.data.max_length)).mean())

    def answer(self, rows: Dataset, ended: list[bool] | None = None) -> list[str]:
        """Greedy answers to the rows' prompts; `ended` gets, for each of them, whether it ended by itself."""
        from ray_peft.tasks.llm_sft.evaluate import answers

        return answers(self.spec, self.model, self.tokenizer, rows, lowered=self.lowered, ended=ended)

    def compute_outputs(self) -> Outputs:
        """Of the model, as it is, on the held-out rows."""
        from ray_peft.tasks.llm_sft.scores import Outputs, answered_rows

        log_probs, general_loss = self.answer_log_probs(), self.general_loss()
        judgement, rewards = self._judge(log_probs)
        answers: list[str] = []
        ended: list[bool] = []
        if self.spec.evaluation.generate:
            answers = self.answer(answered_rows(self.spec, self.scored_rows), ended)
        return Outputs(log_probs, general_loss, answers, ended, judgement, rewards)

    def evaluate(self) -> Scored:
        """Loss, scores of the answers, and what is behind them, on the held-out rows."""
        from ray_peft.tasks.llm_sft.scores import scored

        return scored(self.spec, self.scored_rows, self.outputs or self.compute_outputs())

    @property
    def needs_model(self) -> bool:
        """False once its outputs are there, unless there are benchmarks.

        Metrics of the user's own are taken in the main thread, which is where their code expects to run.
        """
        evaluation = self.spec.evaluation
        return self.outputs is None or evaluation.benchmarks is not None or bool(evaluation.metrics)

    def _judge(self, log_probs: Tensor) -> tuple[dict[str, Any], list[RowReward]]:
        """The scores of pairs or labelled rows, and the rewards behind them; none without such rows.

        Args:
            log_probs: what `answer_log_probs` gives: those of all chosen answers, but of desirable ones alone.
        """
        rows = self.judged.get(self.spec.evaluation.split)
        if rows is None:
            return {}, []
        from ray_peft.tasks.llm_sft.preference import scores
        from ray_peft.tasks.llm_sft.preference.reference import side_log_probs

        pad = cast(int, self.tokenizer.pad_token_id)
        first = None if "desirable" in rows.column_names else log_probs
        sides = side_log_probs(self.spec, self.model, rows, pad, self.lowered, first)
        rewards = scores.rewards(self.spec, rows, sides)
        return scores.summary(self.spec, rows, sides, rewards), rewards

    def benchmark(self, scored: Scored) -> Scored:
        """`scored` with the scores of the lm-eval tasks in `evaluation.benchmarks`."""
        if self.spec.evaluation.benchmarks is None:
            return scored
        from ray_peft.tasks.llm_sft.benchmarks import measure
        from ray_peft.tasks.llm_sft.evaluate import inference

        with inference(self.spec, self.model):
            return measure(self.spec, self.model, self.tokenizer, scored, lowered=self.lowered)

    def save(self, folder: Path, dtype: Dtype | None = None) -> None:
        """Write the adapter, or the weights with the tokenizer, as transformers and PEFT read them."""
        from ray_peft.tasks.llm_sft.model import save

        save(self.model, self.tokenizer, folder, dtype or self.spec.train.save_dtype)
