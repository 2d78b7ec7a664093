"""What the trials of all tasks share."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ray_peft.errors import SpecError
from ray_peft.foundation import dotted
from ray_peft.foundation.durations import seconds_of
from ray_peft.foundation.lists import first_duplicate
from ray_peft.foundation.names import PathPart
from ray_peft.foundation.strict import Strict
from ray_peft.methods import METHODS, AnyMethod
from ray_peft.methods.base import ENOUGH_STEPS, Dtype, Quantization, Task
from ray_peft.spec import identity
from ray_peft.spec.identity import is_local as is_local


class ModelSpec(Strict):
    """The base model and its tokenizer."""

    name: str = Field(min_length=1)
    """Hugging Face repository id, or a local folder (`./name`, `/name` or any path that exists)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None is the default branch."""
    tokenizer: str | None = None
    """Repository id or folder of the tokenizer; None takes the model's own."""
    dtype: Dtype = "bfloat16"
    """The dtype of frozen weights. Methods that train the base choose their own (`method.weights`)."""
    quantization: Quantization | None = None
    """Store a frozen base in 4 or 8 bits, such as `nf4`, under any adapter; method qlora does so by itself."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] | None = None
    """The attention implementation; None takes the model's default."""
    random_weights: bool = False
    """Build the model from its config.json with random weights: true shapes, so true memory and speed, no quality."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become one token each, such as `<tool>`. Tokenizer and embeddings grow by them where the vocabulary
    has no room left. A new row starts as the mean of the rows of all old tokens, and is trained beside an adapter, or
    with all other weights. The texts are no special tokens: they are tokens in rows, and are shown in answers."""

    @field_validator("new_tokens")
    @classmethod
    def _check_new_tokens(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{first_duplicate(tokens)!r} is there twice; name each token once")
        padded = [token for token in tokens if not token or token != token.strip()]
        if padded:
            raise ValueError(f"{padded[0]!r} is empty, or begins or ends with a space; write the text alone")
        return tokens


class WarmStart(Strict):
    """What another trial of the same sweep had trained, from which a trial starts in place of the untouched base."""

    trial: PathPart
    """Its id."""
    step: int = Field(ge=1)
    """Optimizer steps after which it had these weights."""


class TrainSpec(Strict):
    """How long and in which portions to train; the same for every method of a comparison."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows; give this or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step, over all workers and accumulated passes."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per worker per forward pass; halved where memory runs out. With `precision: fp32` it changes nothing; with
    bf16 sums are rounded otherwise, and losses differ in their last digits."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after warm-up; cosine and linear end at zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps for linear warm-up, in place of `warmup_steps`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fit: Literal["auto"] | None = None
    """auto: on a GPU, the largest `micro_batch_size` that is predicted to fit takes the place of what is written, with
    `gradient_checkpointing` only where that lets at least four times the rows pass; `batch_size` stays. What another
    GPU would choose gives equal numbers with `precision: fp32` alone, see `micro_batch_size`. None leaves both as they
    are written."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """The dtype of matrix products while training and evaluating; weights keep their own."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two logged losses."""
    eval_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations of the loss on held-out rows; None evaluates at the end only."""
    checkpoint_every: int | str | None = "5 minutes"
    """Optimizer steps between two checkpoints, such as 100, or the time, such as `5 minutes`, `90 seconds` or `1.5
    hours`; a trial that was interrupted goes on from the last one. By time, a checkpoint comes later where writing the
    one before took more than a twentieth of it, and the end of a stage is kept, too. None writes none inside a stage.
    """
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of the saved adapter or weights."""
    warm_start: WarmStart | None = None
    """Set by `ray-peft ctl clone --warm` alone; None starts from the base, as all trials that are compared do."""

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _steps_or_time(cls, value: object) -> object:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        with contextlib.suppress(ValueError):
            if isinstance(value, str) and seconds_of(value):
                return value.strip()
        raise ValueError(
            f"{value!r} is no distance between two checkpoints; give optimizer steps, such as 100, or a time, such as "
            "5 minutes, 90 seconds or 1.5 hours, or null for none"
        )

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
    def _check_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs (found {self.epochs}) and steps (found {self.steps})")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"give one of warmup_steps (found {self.warmup_steps}) and warmup_ratio (found {self.warmup_ratio})"
            )
        return self


class ResourcesSpec(Strict):
    """What one trial holds while it runs."""

    num_workers: int = Field(default=1, ge=1)
    """Data-parallel workers; more than one trains through Ray Train with the same effective batch."""
    strategy: Literal["data", "fsdp"] = "data"
    """What each of several workers holds. data: the whole model. fsdp: its part of the weights, of their gradients and
    of the optimizer's state, for models that one GPU cannot hold; layers are gathered while they compute."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs, or a share of one; None takes one GPU where the cluster has any, else the CPU. 0 is the CPU."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPU cores, and the threads of torch; None takes a node's cores, shared fairly among its GPUs if it has any."""
    max_failures: int = Field(default=2, ge=0)
    """How often the trial is started again, from its last checkpoint, when its worker died: killed, or its node lost.
    A trial that fails by itself is tried once."""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.strategy == "fsdp" and self.num_workers == 1:
            raise ValueError(
                "strategy: fsdp spreads a model over workers, but num_workers is 1; use num_workers: 2 or more, or "
                "strategy: data"
            )
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
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
    """What the trials of all tasks share; each task has a class of its own. Equal specs are the same trial."""

    task: Task
    model: ModelSpec
    data: Strict
    """The rows that all methods see: the same rows in the same order."""
    method: AnyMethod
    train: TrainSpec
    evaluation: Strict
    """How every trial is scored, on the same held-out rows."""
    resources: ResourcesSpec = ResourcesSpec()
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Draws initial adapters, dropout and the order of training rows."""

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Validate plain JSON-like data as a trial of the task that it names.

        Raises:
            pydantic.ValidationError: the data does not fit.
            SpecError: no such task.
        """
        if cls is not TrialSpec:
            return super().from_plain(plain)
        kinds, task = TrialSpec.kinds(), task_of(plain)
        if task not in kinds:
            raise SpecError(f"task: must be one of {', '.join(kinds)} (found {task!r})")
        return cast(Self, kinds[task].from_plain(plain))

    @staticmethod
    def kinds() -> dict[str, type[TrialSpec]]:
        """The class of each task's trials, by the task: those that ray_peft.spec imports."""
        return {kind.model_fields["task"].default: kind for kind in TrialSpec.__subclasses__()}

    @model_validator(mode="after")
    def _check_problems(self) -> Self:
        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def trial_id(self) -> str:
        """The method's name and eight digits of a hash of what the trial is.

        Before model and data were read it holds their names; checks.trials.inspect_trials puts the id of their content
        in its place, which then goes with the spec to every worker.
        """
        return identity.trial_id(self, None, [member.trial_id for member in self.members()])

    def under(self, trial_id: str, members: Sequence[str] = ()) -> Self:
        """The same trial under an id that was settled for it; of an ensemble, with those of its members."""
        copied = self.model_copy()
        copied.__dict__.update(trial_id=trial_id, _member_ids=tuple(members))
        return copied

    @abstractmethod
    def data_lines(self) -> list[str]:
        """What a report says of its data, one line each."""

    @abstractmethod
    def loss_line(self) -> str:
        """What a report says of its loss."""

    def trained_as(self) -> tuple[object, ...]:
        """The settings of its training that decide which rows it has, and what is said of them."""
        return (self.loss_line(),)

    @abstractmethod
    def scored_as(self) -> tuple[object, ...]:
        """The settings of its evaluation that decide its scores; trials that differ in them have no common base."""

    def looked_for(self) -> list[str]:
        """Of its method, what must be found in the model before anything starts."""
        return []

    def located(self) -> Self:
        """The same trial with every local path made absolute, so that it means the same on every worker."""
        plain = self.plain()
        self._absolute(plain)
        return type(self).from_plain(plain)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same trial with other settings, given by their dotted keys.

        Raises:
            ValueError: there is no such setting, or the trial's rules forbid it.
        """
        plain = self.plain()
        for key, value in settings.items():
            dotted.put(plain, key, value, add=False)
        return type(self).from_plain(plain)

    def members(self) -> list[Self]:
        """Of an ensemble, the trials that it is made of, in the order of its settings; else none."""
        return []

    @property
    def quantization(self) -> Quantization | None:
        """How the base is stored: by the method's need, else by the model's own setting."""
        return self.method.quantization() or self.model.quantization

    @property
    def accumulation(self) -> int:
        """Forward passes per worker and optimizer step."""
        return self.train.batch_size // (self.train.micro_batch_size * self.resources.num_workers)

    def problems(self) -> list[str]:
        """The rules between its parts that it breaks, one sentence each with the way out."""
        train, method, workers = self.train, self.method, self.resources.num_workers
        problems = []
        if self.task not in method.tasks:
            serving = ", ".join(kind.model_fields["name"].default for kind in METHODS if self.task in kind.tasks)
            problems.append(f"method {method.name} does not serve task {self.task}; use one of {serving}")
        if train.batch_size % (train.micro_batch_size * workers):
            problems.append(
                f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
                f"({train.micro_batch_size}) times resources.num_workers ({workers})"
            )
        quantization = self.model.quantization
        if method.needs_full_weights and quantization is not None:
            problems.append(
                f"model.quantization ({quantization.quant_type}) stores weights that cannot be trained without an "
                f"adapter, but method {method.name} trains them; use method qlora, or model.quantization: null"
            )
        own = method.quantization()
        if own is not None and quantization not in (None, own):
            problems.append(
                f"method {method.name} stores the base as its own settings say ({own.quant_type}), but "
                f"model.quantization says {quantization.quant_type}; use method lora, or model.quantization: null"
            )
        if self.quantization is None:
            problems += [reason for _, stage in method.parts() if (reason := stage.why_not_plain())]
        elif not method.needs_full_weights:
            problems += [reason for _, stage in method.parts() if (reason := stage.why_not_on(self.quantization))]
        if self.sharded:
            problems += [f"{reason}; use resources.strategy: data" for reason in self.why_not_sharded()]
        accumulates = train.batch_size > train.micro_batch_size * workers
        return problems + method.conflicts(accumulates=accumulates, num_workers=workers)

    @property
    def sharded(self) -> bool:
        """Whether each worker holds a part of the model."""
        return self.resources.strategy == "fsdp"

    def why_not_sharded(self) -> list[str]:
        """Why its workers cannot hold a part of the model each, one reason each without the way out."""
        key, method = "resources.strategy: fsdp", self.method
        reasons = []
        for _, stage in method.parts():
            if (reason := stage.why_not_sharded()) is not None:
                reasons.append(f"{key} cannot spread method {stage.name} over workers: {reason}")
        if len(method.parts()) > 1:
            reasons.append(f"{key} cannot merge adapters between the stages of method {method.name}")
        if self.quantization is not None and self.quantization.bits == 8:
            reasons.append(f"{key} cannot spread a base in int8, whose layers hold their scales by themselves")
        return reasons

    def cautions(self) -> list[str]:
        """What is allowed and yet known to go wrong, one sentence each."""
        cautions = []
        dtypes = {"model.dtype": self.model.dtype}
        if self.quantization is not None:
            dtypes["the 4-bit base's compute_dtype"] = self.quantization.compute_dtype
            if self.quantization.bits == 8:
                cautions.append(
                    f"{self.method.name}: a base in int8 casts what its layers take to float16, in which values above "
                    "65,504 overflow; which columns it keeps as they are depends on all rows of a pass, so that other "
                    "rows of a pass change losses slightly"
                )
        for name, dtype in dtypes.items():
            if dtype == "float16":
                cautions.append(
                    f"{self.method.name}: {name} is float16, in which values above 65,504 overflow and make the loss "
                    "NaN; bfloat16 has the range of float32 (NVIDIA GPUs from Ampere on)"
                )
        stages = self.method.stages(ENOUGH_STEPS)
        if self.train.fit == "auto" and self.drops_by_pass():
            cautions.append(
                f"{self.method.name}: fit: auto chooses the rows of a pass by the GPU, and with train.engine: trl the "
                "draws of dropout depend on them: on another GPU the trial is as good, but not equal"
            )
        if self.train.fit == "auto" and self.train.precision == "bf16" and stages:
            cautions.append(
                f"{self.method.name}: fit: auto chooses the rows of a pass by the GPU, and under train.precision: bf16 "
                "sums of other sizes are rounded otherwise: on another GPU losses differ in their last digits, in fp32 "
                "they do not"
            )
        return cautions

    def drops_by_pass(self) -> bool:
        """Whether the masks of an adapter's dropout depend on the rows of a pass: those of TRL's loop do."""
        stages = self.method.stages(ENOUGH_STEPS)
        by_trl = getattr(self.train, "engine", "own") == "trl"
        return by_trl and any(getattr(stage, "dropout", 0) for stage, _ in stages)

    def _local_paths(self, plain: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        """Where the task's own part of the plain spec holds names that may be local paths."""
        return []

    def _absolute(self, plain: dict[str, Any]) -> None:
        """Make the local paths of the plain spec absolute."""
        model = plain["model"]
        for holder, key in [(model, "name"), (model, "tokenizer"), *self._local_paths(plain)]:
            if holder[key] is not None and is_local(holder[key]):
                holder[key] = str(Path(holder[key]).expanduser().absolute())


def task_of(plain: Any) -> Any:
    """The task that a trial or its plain data names; one that names none is `llm_sft`."""
    return plain.get("task", "llm_sft") if isinstance(plain, dict) else getattr(plain, "task", "llm_sft")


def check_parts(*, train: float, **held_out: float) -> None:
    """A count is an int, and a float is a fraction of all: of the training part at most 1.0, of others below.

    Raises:
        ValueError: a fraction is too large.
    """
    if isinstance(train, float) and train > 1:
        raise ValueError(f"train ({train}) is a fraction above 1; write a count without a point")
    for name, value in held_out.items():
        if isinstance(value, float) and value >= 1:
            raise ValueError(
                f"{name} ({value}) is a fraction that leaves nothing to train on; write less, or a count without point"
            )
