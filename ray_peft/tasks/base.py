"""The contract of a task: what to train and how to score it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ray_peft.engine.trained import Costs, Report, Trained
from ray_peft.errors import SpecError
from ray_peft.methods.base import Dtype, Stage, Task
from ray_peft.metrics.scores import QuestionScores, RowReward, Sample, Scores
from ray_peft.spec import ModelSpec, TrialSpec
from ray_peft.spec.identity import Content
from ray_peft.vram.cards import ANY, Gpu

if TYPE_CHECKING:
    from PIL.Image import Image

    from ray_peft.vram import Prediction

SpecT = TypeVar("SpecT", bound=TrialSpec)


@dataclass(frozen=True)
class GeneratedImage:
    """An image of the trained model, and what the untouched base makes of the same prompt and seed."""

    prompt: str
    seed: int
    after: Image
    before: Image | None = None
    nearest: str | None = None
    """The training image that is most similar to it in content; None if they were not compared."""
    nearest_likeness: float | None = None
    """How similar: 1.0 is a copy."""


@dataclass(frozen=True)
class Scored:
    """The results of an evaluation."""

    scores: Scores
    samples: list[Sample] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    """(prediction, reference) of every answered row, in row order."""
    prompts: list[str] = field(default_factory=list)
    """The prompt of every answered row."""
    ended: list[bool] = field(default_factory=list)
    """Whether each answer ended by itself, and not because it had `evaluation.max_new_tokens`."""
    own: dict[str, list[float]] = field(default_factory=dict)
    """By name of a metric of `evaluation.metrics`, its value for every answered row."""
    images: list[GeneratedImage] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """The loss of every held-out row, in row order; empty if only their mean is known."""
    loss_tokens: list[int] = field(default_factory=list)
    """Answer tokens behind each of `losses`, which are its weight; a row without any has no loss. Empty if all rows
    weigh the same."""
    rewards: list[RowReward] = field(default_factory=list)
    """Of every held-out pair or labelled row; empty if there are none."""
    questions: list[QuestionScores] = field(default_factory=list)
    """The scores of every question of the further benchmarks; empty if only their means are known."""


@dataclass(frozen=True)
class Inspection:
    """The result of a task's checks of a trial, before it runs."""

    notes: list[str]
    """What a reader of the comparison must know: rows cut, dropped or unusable."""
    data_key: str
    """Content hash of the prepared rows."""
    train_rows: int
    method_notes: list[str] = field(default_factory=list)
    """What a reader must know about the method on this model: layers that it does not reach."""


@dataclass(frozen=True)
class SplitReport:
    """One split of one source, as it is trained on or scored."""

    source: str
    split: str
    """train, validation or test."""
    rows: int
    cut: int
    """Rows of which only the first tokens are used."""
    dropped: int
    """Rows left out and replaced: too long, or their answer begins after the limit."""
    overlapping: int
    """Rows left out and replaced: they repeat held-out rows."""
    tokens: int | None
    """Of all rows, after cutting; None where the preparation was refused."""
    longest: int | None
    trained_tokens: int | None
    """Tokens that carry loss."""


@dataclass(frozen=True)
class DataReport:
    """What happened to the data of some trials."""

    key: str | None
    """Content hash of the prepared rows; None where the preparation was refused."""
    settings: dict[str, Any]
    """Tokenizer and data settings."""
    read: dict[str, int]
    """Rows read, by source."""
    unusable: dict[str, dict[str, int]]
    """Rows left out when read, by source and reason."""
    splits: list[SplitReport]
    overlap: dict[str, Any]
    """Training rows that repeat held-out rows: counts by pair of sources, and the first pairs."""
    overlap_lines: list[str]
    """The same in words."""
    error: str | None = None
    """Why the preparation was refused, or why the rows do not fit a model."""
    remarks: list[str] = field(default_factory=list)
    """What else a reader must know about the rows, a sentence each."""
    unusable_rows: dict[str, dict[str, str]] = field(default_factory=dict)
    """The first rows left out when read, by source and reason, such as `rows 3, 10 and 17`."""


@dataclass(frozen=True)
class Workload:
    """What of a trial's data decides how long it takes."""

    row_tokens: float
    """Mean tokens of a training row."""
    scored_rows: int
    """Held-out rows whose loss is taken."""
    answered_rows: int = 0
    """Those of them that are answered."""


class Bench(ABC):
    """One trial's model and data on one device."""

    data_key: str
    model_fingerprint: str
    lowered: dict[str, int]
    """Settings that were lowered so far because memory ran out, by key."""
    costs: Costs = Costs()
    """What the trial has cost so far."""

    @abstractmethod
    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""

    @abstractmethod
    def parameters(self) -> tuple[int, int]:
        """Parameters that take gradients, and all parameters (a 4-bit weight counts each of its numbers)."""

    def predicted(self) -> Prediction | None:
        """The trial's peak memory, predicted from its model's config and its longest row; None if it cannot be."""
        return None

    def workload(self) -> Workload | None:
        """What of its data decides its time; None for a task whose times are not predicted."""
        return None

    @abstractmethod
    def attach(self, stage: Stage) -> None:
        """Prepare the model for a stage."""

    @abstractmethod
    def train(self, stage: Stage, steps: int, first_step: int, folder: Path, report: Report) -> Trained:
        """Train the attached stage; `folder` keeps its checkpoints, `first_step` counts the steps of earlier stages."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Give what `attach` added the weights that an earlier `save` wrote."""

    @abstractmethod
    def start_from(self, folder: Path) -> None:
        """Give what `attach` added the weights of another trial.

        Args:
            folder: holds that trial's last checkpoint, or its adapter as PEFT writes it.

        Raises:
            ValueError, RuntimeError: it holds neither, or weights of other shapes.
        """

    @abstractmethod
    def merge(self, stage: Stage) -> None:
        """Fold what the stage trained into plain weights."""

    @abstractmethod
    def eval_loss(self) -> float:
        """Loss on the held-out rows."""

    @abstractmethod
    def evaluate(self) -> Scored:
        """All scores on the held-out rows."""

    @property
    def needs_model(self) -> bool:
        """Whether `evaluate`, or what follows it, passes rows through the model."""
        return True

    @property
    def shared(self) -> bool:
        """Whether its model is spread over workers, so that all of them save and score together."""
        return False

    def follow(self, *, saves: bool) -> None:
        """On ranks above 0 of a shared model: take part in what rank 0 does after training, and drop the results.

        Args:
            saves: rank 0 saves what was trained before it scores.
        """
        raise NotImplementedError

    def illustrate(self, scored: Scored) -> Scored:
        """`scored` with generated images, for tasks that generate any."""
        return scored

    def benchmark(self, scored: Scored) -> Scored:
        """`scored` with the scores and the questions of the further benchmarks that the trial asks for."""
        return scored

    @abstractmethod
    def dtypes(self) -> set[str]:
        """The dtypes of its weights as they are now and of its matrix products, such as {"float32", "bfloat16"}."""

    def storage(self) -> dict[str, int]:
        """Bytes of the base's weights in memory by how they are stored; empty if they were not counted."""
        return {}

    def four_bit_share(self) -> float | None:
        """Share of the base's weights that are in 4 bits; None if it is not quantised, or they were not counted."""
        return None

    @abstractmethod
    def save(self, folder: Path, dtype: Dtype | None = None) -> None:
        """Write what was trained, in `dtype`, or else in the trial's `train.save_dtype`."""

    def stored_bytes(self, folder: Path) -> int:
        """Bytes of the weights that `save` wrote into `folder`, each counted once."""
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    def export(self, folder: Path, dtype: Dtype) -> None:
        """Write a model that needs no other files, in `dtype`, after `merge` or of trained full weights."""
        self.save(folder, dtype)


@dataclass(frozen=True)
class MemberModel(Generic[SpecT]):
    """A finished trial that is a member of an ensemble."""

    spec: SpecT
    weights: Path | None
    """The folder that its `save` wrote; None for the untouched base."""


class EnsembleBench(Bench):
    """Several models that answer together; none of them is trained."""

    @abstractmethod
    def tune(self) -> list[float]:
        """Choose the members' weights on the validation rows; they are at least 0 and add up to one."""


@dataclass(frozen=True)
class PackForecast:
    """What is predicted of trials that train together on one base."""

    prediction: Prediction
    """Of all of them in one process."""
    gain: float
    """How many times as long their steps take one trial after the other."""


PackEnded = Callable[[int, Bench, tuple[int, int], Trained, Exception | None], None]
"""Takes a trial of a pack by its place in it, its bench, its `Bench.parameters` in training, what its training took,
and why it failed if it did."""


@dataclass(frozen=True)
class PackTrial:
    """A trial of a pack, as it trains."""

    bench: Bench
    folder: Path
    """Keeps its checkpoints."""
    report: Report
    verdict: Callable[[int], None]
    """Called after a step at which it was evaluated; raises if it is to end (`Job.verdict`)."""


Further = Callable[[], PackTrial | None]
"""Gives a further trial of a pack, with a bench of `TaskType.join_pack`; None if there is none now."""


class TaskType(ABC, Generic[SpecT]):
    """One kind of training. Holds no state."""

    name: ClassVar[Task]
    model_file: ClassVar[str]
    """A file at the top of every model of the task."""

    @abstractmethod
    def inspect(self, spec: SpecT) -> Inspection:
        """Check model, tokenizer and data of a trial, and prepare the data, without weights or GPU.

        Raises:
            DataError, ModelError: the user must correct something.
        """

    def model_content(self, model: ModelSpec) -> str | None:
        """Digest of all files that decide the result of a model's checks; None if something else decides, too.

        It is read without the libraries that load models, which take seconds to import.
        """
        return None

    def content(self, spec: SpecT) -> str | None:
        """Digest of all files that decide the result of `inspect`; None if something else decides, too."""
        return None

    def is_prepared(self, spec: SpecT, data_key: str) -> bool:
        """Whether what `inspect` prepared of the data is still there."""
        return True

    @abstractmethod
    def fingerprint(self, model: ModelSpec) -> str:
        """A text that differs for base models of different content: `Bench.model_fingerprint` of a trial.

        Raises:
            ModelError: the model is not there.
        """

    @abstractmethod
    def released(self, spec: SpecT, row: SpecT) -> Content:
        """The name that release 0.1.0 gave to the content of a trial, if its settings and files were those of `row`.

        Raises:
            DataError, ModelError: the user must correct something.
        """

    def data_report(self, spec: SpecT) -> DataReport:
        """Prepare the data of a trial and report on its rows; if overlap is refused, that is part of the report.

        Raises:
            DataError, ModelError: the user must correct something.
        """
        raise SpecError(f"task {self.name} has no data report; use `ray-peft plan` to check its data")

    def rows_fit(self, spec: SpecT) -> list[str]:
        """What a reader must know about how a trial's rows fit its model, a sentence each.

        Raises:
            DataError, ModelError: the rows do not fit.
        """
        return []

    def write_data(self, spec: SpecT, folder: Path) -> list[Path]:
        """Write the prepared rows of a trial for people to read; returns the files."""
        raise SpecError(f"task {self.name} cannot write its prepared data")

    def predictor(self, spec: SpecT) -> Callable[[SpecT, Gpu], Prediction] | None:
        """A function that predicts the peak memory of a trial and of its variants; None if it cannot be predicted.

        Variants have the same model and rows, which are read once.

        Raises:
            DataError, ModelError: the user must correct something.
        """
        return None

    def predict(self, spec: SpecT, gpu: Gpu = ANY) -> Prediction | None:
        """A trial's peak memory, from its model's config and its prepared data; None if it cannot be predicted.

        Raises:
            DataError, ModelError: the user must correct something.
        """
        predictor = self.predictor(spec)
        return predictor(spec, gpu) if predictor is not None else None

    def workload(self, spec: SpecT) -> Workload | None:
        """What of a trial's data decides its time; None for a task whose times are not predicted.

        Raises:
            DataError, ModelError: the user must correct something.
        """
        return None

    @abstractmethod
    def total_steps(self, spec: SpecT, train_rows: int) -> int:
        """Optimizer steps of a whole trial."""

    def base_key(self, spec: SpecT, device: str) -> str | None:
        """What decides the base that `load` puts on `device`, if `load` keeps it for the next trial; None if not."""
        return None

    @abstractmethod
    def load(self, spec: SpecT, device: str) -> Bench:
        """The trial's data and its model on `device`, seeded."""

    @abstractmethod
    def load_trained(self, spec: SpecT, weights: Path, device: str) -> Bench:
        """A finished trial's data and model, with the weights that its `save` wrote."""

    def check_gguf(self, spec: SpecT) -> None:
        """Refuse a trial whose merged model cannot be a GGUF file, before anything is merged.

        Raises:
            SpecError: it cannot.
        """
        raise SpecError(f"task {self.name} writes no GGUF files, which hold language models; use --format merged")

    def write_gguf(self, folder: Path, file: Path) -> None:
        """Write a merged model's folder as a GGUF file, and check that it gives the same logits.

        Raises:
            SpecError: GGUF has no place for such a model or tokenizer.
            TrialFailed: the file gives other logits.
        """
        raise SpecError(f"task {self.name} writes no GGUF files")

    def bases(self, specs: Sequence[SpecT]) -> list[list[SpecT]]:
        """The trials by the base that they may share, in their order; one that can share with none is by itself."""
        return [[spec] for spec in specs]

    def follows(self, spec: SpecT, others: Sequence[SpecT]) -> bool:
        """Whether a trial may take a place of a pack that was made for others of the same base."""
        return False

    def forecast(self, specs: Sequence[SpecT], gpu: Gpu) -> PackForecast | None:
        """What is predicted of trials of one base that train together; None if it cannot be.

        Raises:
            DataError, ModelError: the user must correct something.
        """
        return None

    def load_pack(self, specs: Sequence[SpecT], device: str) -> list[Bench]:
        """The benches of trials that share one base, which is held once.

        Raises:
            SpecError: they cannot.
        """
        raise SpecError(f"task {self.name} has no packs")

    def join_pack(self, benches: Sequence[Bench], spec: SpecT) -> Bench:
        """The bench of a further trial on the base of those of a pack.

        Raises:
            SpecError: it cannot share that.
        """
        raise SpecError(f"task {self.name} has no packs")

    def train_pack(self, trials: Sequence[PackTrial], ended: PackEnded, further: Further = lambda: None) -> None:
        """Train the only stage of each of `load_pack`'s benches, all at once.

        Args:
            trials: with these benches.
            ended: told of each, with what it has trained in its bench's model.
            further: asked for a trial that takes the place of one that has ended before others.
        """
        raise SpecError(f"task {self.name} has no packs")

    def load_ensemble(self, spec: SpecT, members: list[MemberModel[SpecT]], device: str) -> EnsembleBench:
        """The models of an ensemble's members on `device`, each base held once."""
        raise SpecError(f"task {self.name} has no ensembles")
