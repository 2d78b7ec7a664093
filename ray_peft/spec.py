"""What one trial is: one cell of the grid method x model x data x hyperparameters. Imports neither torch nor Ray."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_peft.methods import AnyMethod
from ray_peft.methods.base import Dtype, Quantization, Stage, Task
from ray_peft.methods.ensemble import Ensemble
from ray_peft.strict import Strict

Recipe = Literal["alpaca", "dolly", "tulu", "ultrachat", "messages", "prompt_completion", "text"]


class ModelSpec(Strict):
    """The base model and its tokenizer."""

    name: str = Field(min_length=1)
    """Hugging Face repository id, or a local folder (`./name`, `/name` or any path that exists)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is the default branch."""
    tokenizer: str | None = None
    """Repository id or folder of the tokenizer; null takes the model's own."""
    dtype: Dtype = "bfloat16"
    """The dtype of frozen weights. Methods that train the base choose their own (`method.weights`)."""
    quantization: Quantization | None = None
    """Store a frozen base in 4 bits; method qlora does so by itself."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] | None = None
    """The attention implementation; null takes the model's default."""
    random_weights: bool = False
    """Build the model from its config.json with random weights: true shapes, so true memory and speed, no quality."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""


class SourceSpec(Strict):
    """One data set: where its rows are and how they become conversations."""

    recipe: Recipe
    path: str = Field(min_length=1)
    """A .jsonl or .json file (also as .gz), a .parquet file, or a hub data set id."""
    test_path: str | None = None
    """A file with the held-out rows; null takes them from `path`, apart from the training rows."""
    train: int | float = Field(gt=0)
    """Training rows: a count (int), or a fraction of all rows (float up to 1.0, which means all others)."""
    test: int | float = Field(gt=0)
    """Held-out rows: a count (int), or a fraction of all rows (float below 1.0)."""
    validation: int | float = Field(default=0, ge=0)
    """Rows of `path` for choices made after training, apart from the others: a count, or a fraction; 0 takes none."""
    name: str | None = None
    """The `source_dataset` tag of its rows; null takes the recipe's name."""
    split: str = "train"
    """The split of a hub data set."""

    @model_validator(mode="after")
    def _fractions_are_parts(self) -> Self:
        if isinstance(self.train, float) and self.train > 1:
            raise ValueError(f"train ({self.train}) is a fraction above 1; write a count without a point")
        if isinstance(self.test, float) and self.test >= 1:
            raise ValueError(f"test ({self.test}) is a fraction that leaves no training rows; write a count or less")
        if isinstance(self.validation, float) and self.validation >= 1:
            raise ValueError(
                f"validation ({self.validation}) is a fraction that leaves no training rows; write a count without a "
                "point, or less"
            )
        return self

    @property
    def label(self) -> str:
        """The tag of its rows."""
        return self.name or self.recipe


class ContaminationSpec(Strict):
    """What happens to training rows that repeat test or validation rows (tasks/llm_sft/overlap.py says how)."""

    action: Literal["fail", "drop", "allow"] = "fail"
    """fail: nothing starts. drop: the next drawn rows take their place. allow: they are trained on, and it is said."""
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
    """A .jinja file that replaces the tokenizer's chat template; null keeps the model's own."""
    contamination: ContaminationSpec = ContaminationSpec()
    """The rule for training rows that repeat held-out rows of any source."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two sources carry the tag {_first_double(labels)!r}; give one of them a `name`")
        return self


class TrainSpec(Strict):
    """How long and in which portions to train; the same for every method of a comparison."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; give this or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step, over all workers and accumulated passes."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per worker per forward pass; lower it when memory runs out. It does not change what is computed."""
    loss: Literal["answers", "all"] = "answers"
    """The tokens that are trained: the assistant's turns with their end-of-turn token, or all tokens."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after warm-up; cosine and linear end at zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps for linear warm-up, in place of `warmup_steps`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """The dtype of matrix products while training and evaluating; weights keep their own."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two logged losses."""
    eval_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations of the loss on held-out rows; null evaluates at the end only."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints; a trial that was interrupted goes on from the last one."""
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of the saved adapter or weights."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value in ("fp16", "float16"):
            raise ValueError(
                f"{value} has no range for gradients, which become NaN or zero without loss scaling; "
                "use bf16, which has the range of fp32, or fp32 on a GPU without bf16"
            )
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs (found {self.epochs}) and steps (found {self.steps})")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"give one of warmup_steps (found {self.warmup_steps}) and warmup_ratio (found {self.warmup_ratio})"
            )
        return self


class BenchmarksSpec(Strict):
    """Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness) that every trial is scored on besides.

    lm-eval is an extra: `pip install "ray-peft[benchmarks]"`.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of lm-eval tasks, groups or tags, such as arc_easy or mmlu."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; null takes each task's own number, and a task that is fixed at 0 stays."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each task, the first of them; null asks all."""
    include_path: str | None = Field(default=None, min_length=1)
    """A folder with task files of your own (*.yaml). Relative paths in them, such as data_files, start there."""
    batch_size: int = Field(default=8, ge=1)
    """Requests answered at a time; their logits are held for the whole vocabulary."""
    allow_code_execution: bool = False
    """Run the code that the model writes, on the worker and without a sandbox; HumanEval and MBPP need it."""

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"{_first_double(list(tasks))!r} is there twice; name each task once")
        return tasks


class EvaluationSpec(Strict):
    """How every trial is scored, on the same held-out rows."""

    generate: bool = True
    """Answer the held-out prompts and score BLEU-4 and ROUGE-L; false gives the loss alone."""
    rows: int | None = Field(default=None, ge=1)
    """Held-out rows to answer, the first of them; null answers all. The loss always uses all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer; decoding is greedy."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts answered at a time."""
    samples: int = Field(default=10, ge=0)
    """Rows of the sample table: prompt, reference and answer."""
    benchmarks: BenchmarksSpec | None = None
    """Tasks of lm-eval after that; null runs none."""


class ResourcesSpec(Strict):
    """What one trial holds while it runs."""

    num_workers: int = Field(default=1, ge=1)
    """Data-parallel workers; more than one trains through Ray Train with the same effective batch."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs, or a share of one; null takes one GPU where the cluster has any, else the CPU. 0 is the CPU."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPU cores, and the threads of torch; null takes a node's cores, shared fairly among its GPUs if it has any."""

    @model_validator(mode="after")
    def _whole_gpus_together(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus is not None and gpus != int(gpus):
            if gpus > 1:
                raise ValueError(f"gpus_per_worker ({gpus}) above 1 must be a whole number")
            if self.num_workers > 1:
                raise ValueError(
                    f"gpus_per_worker ({gpus}) is a share of a GPU, but num_workers ({self.num_workers}) workers "
                    "that exchange gradients cannot sit on one GPU; use gpus_per_worker: 1 or num_workers: 1"
                )
        if gpus is not None and gpus > 1:
            raise ValueError(f"gpus_per_worker ({gpus}): a worker uses one GPU; ask for more num_workers instead")
        return self


class TrialSpec(Strict):
    """One trial. Equal specs are the same trial."""

    task: Task = "llm_sft"
    model: ModelSpec
    data: DataSpec
    method: AnyMethod
    train: TrainSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourcesSpec = ResourcesSpec()
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Draws initial adapters, dropout and the order of training rows."""

    @model_validator(mode="after")
    def _means_what_it_says(self) -> Self:
        problems = legality(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def trial_id(self) -> str:
        """The method's name and eight digits of the spec's content hash."""
        canonical = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))
        return f"{self.method.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"

    def located(self) -> Self:
        """The same trial with every local path made absolute, so that it means the same on every worker."""
        plain = self.plain()
        model, sources = plain["model"], plain["data"]["sources"]
        members = plain["method"].get("members", [])
        for holder, key in [
            *((model, key) for key in ("name", "tokenizer")),
            (plain["data"], "chat_template"),
            *((source, key) for source in sources for key in ("path", "test_path")),
            *((member, "model") for member in members),
        ]:
            if holder[key] is not None and is_local(holder[key]):
                holder[key] = str(Path(holder[key]).expanduser().absolute())
        benchmarks = plain["evaluation"]["benchmarks"]
        if benchmarks is not None and benchmarks["include_path"] is not None:  # a folder, whether it exists or not
            benchmarks["include_path"] = str(Path(benchmarks["include_path"]).expanduser().absolute())
        return type(self).from_plain(plain)

    def members(self) -> list[TrialSpec]:
        """Of an ensemble, the trials that it is made of, in the order of its settings; else none."""
        if not isinstance(self.method, Ensemble):
            return []
        found = []
        for member in self.method.members:
            other = {"name": member.model, "revision": None, "tokenizer": None}
            model = self.model if member.model is None else self.model.model_copy(update=other)
            seed = self.seed if member.seed is None else member.seed
            own = {"method": member.method, "model": model, "seed": seed}
            # Not model_copy, which would copy the cached trial_id; the parts are checked, legality() sees the whole.
            found.append(TrialSpec.model_construct(**{**dict(self), **own}))
        return found

    @property
    def quantization(self) -> Quantization | None:
        """How the base is stored: by the method's need, else by the model's own setting."""
        return self.method.quantization() or self.model.quantization

    @property
    def accumulation(self) -> int:
        """Forward passes per worker and optimizer step."""
        return self.train.batch_size // (self.train.micro_batch_size * self.resources.num_workers)


def legality(spec: TrialSpec) -> list[str]:
    """The rules between parts of a spec that it breaks, one sentence each with the way out."""
    train, method, workers = spec.train, spec.method, spec.resources.num_workers
    problems = []
    if spec.task not in method.tasks:
        problems.append(f"method {method.name} does not serve task {spec.task}")
    if train.batch_size % (train.micro_batch_size * workers):
        problems.append(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}) times resources.num_workers ({workers})"
        )
    if method.needs_full_weights and spec.model.quantization is not None:
        problems.append(
            f"model.quantization ({spec.model.quantization.quant_type}) stores weights that cannot be trained without "
            f"an adapter, but method {method.name} trains them; use method qlora, or model.quantization: null"
        )
    if isinstance(method, Stage) and method.name == "lora" and spec.model.quantization is not None:
        problems.append("method lora on a quantised base is method qlora; use that, or model.quantization: null")
    if train.loss == "answers" and any(source.recipe == "text" for source in spec.data.sources):
        problems.append(
            "train.loss: answers needs turns, but recipe text has none; use train.loss: all, or a recipe with turns"
        )
    if spec.evaluation.generate and any(source.recipe == "text" for source in spec.data.sources):
        problems.append(
            "evaluation.generate: true needs prompts, but recipe text has none; set evaluation.generate: false"
        )
    problems += _ensemble_problems(spec)
    accumulates = train.batch_size > train.micro_batch_size * workers
    problems += method.conflicts(accumulates=accumulates, num_workers=workers)
    return problems


def cautions(spec: TrialSpec) -> list[str]:
    """What is allowed and yet known to go wrong, one sentence each."""
    found = []
    used = {"model.dtype": spec.model.dtype}
    if spec.quantization is not None:
        used["the 4-bit base's compute_dtype"] = spec.quantization.compute_dtype
    for name, dtype in used.items():
        if dtype == "float16":
            found.append(
                f"{spec.method.name}: {name} is float16, in which values above 65,504 overflow and make the loss NaN; "
                "bfloat16 has the range of float32 (NVIDIA GPUs from Ampere on)"
            )
    return found


def _ensemble_problems(spec: TrialSpec) -> list[str]:
    members = spec.members()
    if not members:
        return []
    problems = [f"method.members: {problem}" for member in members for problem in legality(member)]
    ids = [member.trial_id for member in members]
    if len(set(ids)) < len(ids):
        problems.append(f"method.members: {_first_double(ids)} is there twice; give members that differ")
    if not any(source.validation for source in spec.data.sources):
        problems.append(
            "method.members: an ensemble tunes its weights on validation rows, which are neither trained on nor tested "
            "on, but no source has any; set `validation` of a source in data.sources"
        )
    return problems


def is_local(name: str) -> bool:
    """True if `name` means a path on this machine rather than a hub id."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def _first_double(labels: list[str]) -> str:
    return next(label for label in labels if labels.count(label) > 1)
