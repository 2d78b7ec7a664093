"""A trial of the task `llm_sft`: instruction tuning of a causal language model."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ray_peft.foundation.lists import first_duplicate
from ray_peft.foundation.strict import Strict
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.base import Stage
from ray_peft.methods.ensemble import Ensemble
from ray_peft.methods.lora import LoRA
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import preference
from ray_peft.spec.base import TrainSpec, TrialSpec, check_parts
from ray_peft.spec.preference import Objective, PreferenceSpec

Recipe = Literal[
    "alpaca", "dolly", "tulu", "ultrachat", "messages", "prompt_completion", "preference", "labelled", "text"
]


class SourceSpec(Strict):
    """One data set: where its rows are and how they become conversations."""

    recipe: Recipe
    path: str = Field(min_length=1)
    """A .jsonl, .json, .csv or .tsv file (also as .gz), a .parquet file, a folder with shards of one of these kinds, or
    a hub data set id."""
    test_path: str | None = None
    """A file or folder with the held-out rows; None takes them from `path`, apart from the training rows."""
    train: int | float = Field(gt=0)
    """Training rows: a count (int), or a fraction of all rows (float up to 1.0, which means all others)."""
    test: int | float = Field(gt=0)
    """Held-out rows: a count (int), or a fraction of all rows (float below 1.0)."""
    validation: int | float = Field(default=0, ge=0)
    """Rows of `path` for choices made after training, apart from the others: a count, or a fraction; 0 takes none."""
    name: str | None = None
    """The `source_dataset` tag of its rows; None takes the recipe's name."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; None is its main branch."""

    @model_validator(mode="after")
    def _check_fractions(self) -> Self:
        check_parts(train=self.train, test=self.test, validation=self.validation)
        return self

    @property
    def label(self) -> str:
        """The tag of its rows."""
        return self.name or self.recipe


class ContaminationSpec(Strict):
    """What happens to training rows that repeat test or validation rows (tasks/llm_sft/overlap.py says how)."""

    action: Literal["fail", "drop", "allow"] = "fail"
    """fail: nothing starts. drop: the next drawn rows replace them. allow: they are trained on; the report says so."""
    ngram: int = Field(default=8, ge=2, le=100)
    """Words of the n-grams that are compared, and of the shortest question that counts by itself."""
    threshold: float = Field(default=0.7, gt=0, le=1)
    """Share of a held-out row's n-grams that a training row may not reach."""
    boilerplate: int = Field(default=10, ge=1)
    """N-grams in more rows than this are templates and do not count."""


class DataSpec(Strict):
    """The rows that all methods see: the same rows in the same order."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    seed: int = Field(default=42, ge=0)
    """Draws the rows and their split; apart from the trial's seed, so that seeds vary training and not the test."""
    max_length: int = Field(default=512, ge=8)
    """Tokens of a row, chat template included."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to a longer training row: keep its first `max_length` tokens, or leave it out. Both are counted."""
    chat_template: str | None = None
    """A .jinja file that replaces the tokenizer's chat template; None keeps the model's own."""
    template_date: date = date(2024, 7, 26)
    """The day that a chat template prints if it prints one, so that equal rows are equal whenever they are prepared."""
    special_tokens: Literal["text", "control"] = "text"
    """What special tokens such as <|im_end|> are in the text of a row: text, or the tokens that end and begin turns."""
    unusable: Literal["fail", "skip"] = "fail"
    """What happens to a row that cannot be read or lacks what its recipe reads: nothing starts, or it is left out.
    Rows that hold nothing to learn from, such as empty answers, are left out either way. All are counted and named."""
    contamination: ContaminationSpec = ContaminationSpec()
    """The rule for training rows that repeat held-out rows of any source."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two sources carry the tag {first_duplicate(labels)!r}; give one of them a `name`")
        return self


class LlmTrainSpec(TrainSpec):
    """Training, and which tokens carry loss."""

    engine: Literal["own", "trl"] = "own"
    """What runs the steps: our own loop, or TRL's SFTTrainer, whose numbers it has; the latter neither goes on with
    fewer rows a pass where memory runs out, nor records passes, and its dropout depends on the rows of a pass."""
    cuda_graphs: bool = True
    """On a GPU, lay the rows of a step one after the other into few static shapes and record each as a CUDA graph: the
    same numbers but for rounding, without waiting for the host. Models that cannot are trained as they are. Answers and
    held-out losses are recorded, too."""
    loss: Literal["answers", "all"] = "answers"
    """The tokens that are trained: the assistant's turns with their end-of-turn token, or all tokens. With objective
    orpo those of the chosen answer's own loss; TRL's ORPOTrainer trains on all."""
    objective: Objective = "sft"
    """What is learned: answers (sft); of two answers the better one (dpo, orpo); or good answers and bad ones (kto)."""
    preference: PreferenceSpec = PreferenceSpec()
    """The loss of dpo, orpo and kto."""
    pack: Literal["auto"] | bool = False
    """Train this trial together with others on one base, with the numbers that each has alone. auto: in a sweep on a
    GPU, where that is predicted to be faster and fits; true: in every sweep, on a CPU as well. Times and peaks of such
    trials are shares of what all of them take; false is for sweeps that compare methods by time or memory."""


class BenchmarksSpec(Strict):
    """Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness) that every trial is also scored on.

    lm-eval is an extra: `pip install "ray-peft[benchmarks]"`.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of lm-eval tasks, groups or tags, such as arc_easy or mmlu."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; None takes each task's own number, and a task that is fixed at 0 stays."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each task, the first of them; None asks all."""
    include_path: str | None = Field(default=None, min_length=1)
    """A folder with task files of your own (*.yaml). Relative paths in them, such as data_files, start there."""
    batch_size: int = Field(default=8, ge=1)
    """Requests answered at a time; their logits are held for the whole vocabulary."""
    allow_code_execution: bool = False
    """Run code without a sandbox: what the model writes, on the worker, which HumanEval and MBPP need; and what task
    files of `include_path` name by `!function`, already when they are read."""

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"{first_duplicate(tasks)!r} is there twice; name each task once")
        return tasks


class EvaluationSpec(Strict):
    """How every trial is scored, on the same held-out rows."""

    split: Literal["test", "validation"] = "test"
    """The held-out rows that are scored. Settings that are chosen by their scores are chosen on validation rows: then
    no choice has seen the test rows, on which the chosen ones are compared."""
    generate: bool = True
    """Answer the held-out prompts and score BLEU-4 and ROUGE-L; false gives the loss alone."""
    rows: int | None = Field(default=None, ge=1)
    """Held-out rows to answer, the first of them; None answers all. The loss always uses all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer; decoding is greedy."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts answered at a time; lowered where memory runs out. In fp32 that changes no answer; in bf16 it may turn
    one at a near tie of two tokens."""
    general_text: bool = False
    """Also take the loss on a fixed general text that comes with ray_peft (tasks/llm_sft/general_text.py): what it
    rises by in training is forgotten."""
    samples: int = Field(default=10, ge=0)
    """Rows of the sample table: prompt, reference and answer."""
    benchmarks: BenchmarksSpec | None = None
    """Tasks of lm-eval after that; None runs none."""
    metrics: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")], ...] = ()
    """Metrics of one's own: MODULE:FUNCTION of functions that give a number for an answer and its reference."""


_LOOKED_FOR_ANYWAY = {*Stage.model_fields, "name", "targets", "rank", "dropout", "alpha", "adapter_dtype", "optim"}
"""Settings of an adapter that are looked for by themselves, or that nothing in a model decides."""


class LlmTrialSpec(TrialSpec):
    """One trial of instruction tuning."""

    task: Literal["llm_sft"] = "llm_sft"
    data: DataSpec
    train: LlmTrainSpec
    evaluation: EvaluationSpec = EvaluationSpec()

    def data_lines(self) -> list[str]:
        """One line a source."""
        return [
            f"{source.label}: {source.train} for training, {source.test} held out"
            + (f", {source.validation} for validation" if source.validation else "")
            for source in self.data.sources
        ]

    def loss_line(self) -> str:
        """Which tokens are trained."""
        return f"loss on {'all tokens' if self.train.loss == 'all' else 'answers'}"

    def trained_as(self) -> tuple[object, ...]:
        """Which tokens are trained, the form that the objective gives rows, and kto's weights of them."""
        weights = self.train.preference.desirable_weight, self.train.preference.undesirable_weight
        return (*super().trained_as(), self.train.objective, *weights)

    def scored_as(self) -> tuple[object, ...]:
        """Which rows are scored and answered, and at what length."""
        return (self.evaluation.split, self.evaluation.rows, self.evaluation.max_new_tokens)

    def looked_for(self) -> list[str]:
        """The layers that its stages train, their rank, and how the base is stored."""
        entries = []
        for trial in self.members() or [self]:
            storage = trial.quantization.plain() if trial.quantization else None
            for key, stage in trial.method.parts():
                decides = [getattr(stage, name, None) for name in ("targets", "rank", "dropout")]
                if isinstance(stage, Adapter):
                    own = {name: value for name, value in stage.plain().items() if name not in _LOOKED_FOR_ANYWAY}
                    decides.append({name: value for name, value in own.items() if value})
                entries.append(json.dumps([key, stage.name, *decides, storage]))
        return entries

    def members(self) -> list[Self]:
        """Of an ensemble, the trials that it is made of, in the order of its settings; else none."""
        if not isinstance(self.method, Ensemble):
            return []
        members: list[Self] = []
        for member in self.method.members:
            changes = {"name": member.model, "revision": None, "tokenizer": None}
            model = self.model if member.model is None else self.model.model_copy(update=changes)
            seed = self.seed if member.seed is None else member.seed
            parts = {"method": member.method, "model": model, "seed": seed}
            # Not model_copy, which would copy the cached trial_id; the parts are checked, problems() sees the whole.
            members.append(cast(Self, LlmTrialSpec.model_construct(**{**dict(self), **parts})))
        settled: tuple[str, ...] = self.__dict__.get("_member_ids", ())
        return (
            [member.under(trial_id) for member, trial_id in zip(members, settled, strict=True)] if settled else members
        )

    def problems(self) -> list[str]:
        """Those of every task, of rows without turns, and of an ensemble's members."""
        problems = super().problems()
        turnless = any(source.recipe == "text" for source in self.data.sources)
        if self.train.loss == "answers" and turnless:
            problems.append(
                "train.loss: answers needs turns, but recipe text has none; use train.loss: all, or a recipe with turns"
            )
        if self.evaluation.generate and turnless:
            problems.append(
                "evaluation.generate: true needs prompts, but recipe text has none; set evaluation.generate: false"
            )
        for key, stage in self.method.parts() if self.train.engine == "trl" else []:
            if (setting := stage.needs_own_loop()) is not None:
                problems.append(
                    f"{key}.{setting} cannot be trained by train.engine: trl, which would not clip it; "
                    "use train.engine: own, or leave the setting out"
                )
        if self.evaluation.split == "validation" and not any(source.validation for source in self.data.sources):
            problems.append(
                "evaluation.split: validation needs validation rows, but no source has any; set `validation` of a "
                "source in data.sources, or evaluation.split: test"
            )
        problems += preference.problems(self) + self._adapter_problems() + self._new_token_problems()
        return problems + self._ensemble_problems()

    def _new_token_problems(self) -> list[str]:
        """Methods beside which new embeddings cannot be trained, and loops that do not train them."""
        if not self.model.new_tokens:
            return []
        adapters = [stage for _, stage in self.method.parts() if isinstance(stage, Adapter)]
        problems = [reason for stage in adapters if (reason := stage.why_not_new_tokens()) is not None]
        if self.train.engine == "trl":
            problems.append("model.new_tokens are trained by train.engine: own alone; use that, or leave them out")
        return problems

    def why_not_sharded(self) -> list[str]:
        """Those of every task, of other training loops, of judged rows and of benchmarks."""
        key, train = "resources.strategy: fsdp", self.train
        reasons = super().why_not_sharded()
        if train.engine != "own":
            reasons.append(f"{key} is served by our loop alone (found train.engine: {train.engine})")
        if train.objective != "sft":
            reasons.append(
                f"{key} cannot compute what the model said before training, which train.objective: {train.objective} "
                "compares with"
            )
        if self.model.new_tokens:
            reasons.append(f"{key} was not tried with model.new_tokens")
        if self.evaluation.benchmarks is not None:
            reasons.append(f"{key} cannot run evaluation.benchmarks, which rank 0 scores alone")
        return reasons

    def _adapter_problems(self) -> list[str]:
        """The rules of PEFT's adapters: which loop trains them, and what virtual tokens before a row forbid."""
        method, problems = self.method, []
        if not isinstance(method, Adapter) or isinstance(method, LoRA | QLoRA):
            return []
        if self.train.engine == "trl":
            problems.append(
                f"train.engine: trl trains lora and qlora alone of PEFT's adapters (found method {method.name}); use "
                "train.engine: own"
            )
        if method.trains_prompts and self.evaluation.benchmarks is not None:
            problems.append(
                f"evaluation.benchmarks score tokens by their places, which virtual tokens of method {method.name} "
                "shift; leave them out, or use another method"
            )
        if method.peft_kind == "PREFIX_TUNING" and self.train.gradient_checkpointing:
            problems.append(
                f"train.gradient_checkpointing drops the trained keys and values of method {method.name}; set it to "
                "false, or use method prompt_tuning"
            )
        return problems

    def _ensemble_problems(self) -> list[str]:
        members = self.members()
        if not members:
            return []
        problems = [f"method.members: {problem}" for member in members for problem in member.problems()]
        virtual = [m.method.name for m in members if isinstance(m.method, Adapter) and m.method.trains_prompts]
        if virtual:
            problems.append(
                f"method.members: {virtual[0]} puts virtual tokens before each row, so that its tokens lie elsewhere "
                "than those of the other members; use another method"
            )
        if self.evaluation.split == "validation":
            problems.append(
                "evaluation.split: validation cannot score an ensemble, whose weights are tuned on those rows; use test"
            )
        ids = [member.trial_id for member in members]
        if len(set(ids)) < len(ids):
            problems.append(f"method.members: {first_duplicate(ids)} is there twice; give members that differ")
        if not any(source.validation for source in self.data.sources):
            problems.append(
                "method.members: an ensemble tunes its weights on validation rows, which are neither trained on nor "
                "tested on, but no source has any; set `validation` of a source in data.sources"
            )
        return problems

    def _local_paths(self, plain: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        sources, members = plain["data"]["sources"], plain["method"].get("members", [])
        return [
            (plain["data"], "chat_template"),
            *((source, key) for source in sources for key in ("path", "test_path")),
            *((member, "model") for member in members),
        ]

    def _absolute(self, plain: dict[str, Any]) -> None:
        super()._absolute(plain)
        benchmarks = plain["evaluation"]["benchmarks"]
        if benchmarks is not None and benchmarks["include_path"] is not None:  # a folder, whether it exists or not
            benchmarks["include_path"] = str(Path(benchmarks["include_path"]).expanduser().absolute())
