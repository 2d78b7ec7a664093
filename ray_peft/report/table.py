"""A comparison as values: one row per trial, with differences to the untouched base; formats live elsewhere."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ray_peft.methods import METHODS
from ray_peft.report.flat import flat_spec
from ray_peft.report.labels import labels
from ray_peft.store.results_file import latest
from ray_peft.trial.result import Status, TrialResult

BASE_METHOD = "none"
Phase = Literal["load_s", "train_s", "evaluate_s", "save_s", "wall_time_s"]
_ORDER = {method.model_fields["name"].default: position for position, method in enumerate(METHODS)}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured value beside that of the base row."""

    value: float | None
    """None if it was not measured."""
    base: float | None = None
    """None if there is no base row or it was not measured there."""

    @property
    def difference(self) -> float | None:
        """The value less that of the base."""
        return None if self.value is None or self.base is None else self.value - self.base

    @property
    def relative(self) -> float | None:
        """The difference as a share of the base; None on a base of zero."""
        return None if self.difference is None or not self.base else self.difference / abs(self.base)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial of the comparison; what the result holds already is read from there."""

    label: str
    """The method and the settings that tell it from the other rows; pure ASCII."""
    result: TrialResult
    base: TrialResult | None
    """The finished trial without fine-tuning on the same model and data; None for that trial itself."""

    @property
    def trial_id(self) -> str:
        """Names the trial in files."""
        return self.result.trial_id

    @property
    def status(self) -> Status:
        """How the trial ended."""
        return self.result.status

    @property
    def eval_loss(self) -> Score:
        """Loss on the held-out rows; lower is better."""
        return self._score(lambda result: result.scores.eval_loss)

    @property
    def general_loss(self) -> Score:
        """Loss on a general text: what it rises by is forgotten."""
        return self._score(lambda result: result.scores.general_loss)

    @property
    def bleu4(self) -> Score:
        """Corpus BLEU-4."""
        return self._score(lambda result: result.scores.bleu4)

    @property
    def rouge_l(self) -> Score:
        """Mean ROUGE-L."""
        return self._score(lambda result: result.scores.rouge_l)

    @property
    def chrf(self) -> Score:
        """Corpus chrF."""
        return self._score(lambda result: result.scores.chrf)

    @property
    def exact_match(self) -> float | None:
        """Share of exact answers; None where there is none, as of long answers."""
        return self.result.scores.exact_match or None

    @property
    def style_heldout(self) -> Score:
        """Likeness in style to the held-out paintings."""
        return self._style(lambda result: result.scores.style_heldout)

    @property
    def style_train(self) -> Score:
        """Likeness in style to the training paintings."""
        return self._style(lambda result: result.scores.style_train)

    @property
    def nearest_train(self) -> Score:
        """Likeness in content to the nearest training painting."""
        return self._score(lambda result: result.scores.nearest_train)

    @property
    def of_images(self) -> bool:
        """Whether the trial's rows are images."""
        return self.result.spec.task == "text_to_image"

    @property
    def on_gpu(self) -> bool:
        """Whether GPU memory was measured."""
        return self.result.usage.peak_allocated_gib is not None

    @property
    def peak_memory_gib(self) -> float | None:
        """Peak allocated on the GPU, or on a CPU resident memory of the process."""
        return self.result.usage.peak_allocated_gib if self.on_gpu else self.result.usage.peak_rss_gib

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters as a share of all; None if they were not counted."""
        total = self.result.total_parameters
        return self.result.trainable_parameters / total if total else None

    def seconds(self, phase: Phase) -> float | None:
        """Time spent; None for a phase that a trial did not come to before it failed."""
        value: float = getattr(self.result.usage, phase)
        return value if value or self.status == "finished" else None

    @property
    def error_line(self) -> str | None:
        """Why the trial did not finish, in one line; None if it finished."""
        return None if self.status == "finished" else error_line(self.result)

    def _style(self, read: Callable[[TrialResult], float | None]) -> Score:
        """Of images; those of a base with other prompts or steps are no base."""
        alike = self.base is not None and self.base.spec.evaluation == self.result.spec.evaluation
        return self._score(read) if alike else Score(value=read(self.result))

    def _score(self, read: Callable[[TrialResult], float | None]) -> Score:
        return Score(value=read(self.result), base=None if self.base is None else read(self.base))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A value over several seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    """Values behind the mean."""


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Trials that differ in their seed alone."""

    label: str
    rows: tuple[Row, ...]

    @property
    def is_base(self) -> bool:
        """Whether it is of the model without fine-tuning."""
        return is_base(self.rows[0].result)

    @property
    def finished(self) -> tuple[Row, ...]:
        """The rows that `spread` looks at."""
        return tuple(row for row in self.rows if row.status == "finished")

    def spread(self, read: Callable[[Row], float | None]) -> Spread | None:
        """Mean, minimum and maximum over the finished rows that have the value; None if none has."""
        values = [value for row in self.finished if (value := read(row)) is not None]
        if not values:
            return None
        return Spread(mean=fmean(values), low=min(values), high=max(values), seeds=len(values))


def rows(results: Sequence[TrialResult]) -> list[Row]:
    """The comparison: in the order of the method registry, then as given; of a trial given twice the later one."""
    trials = sorted(latest(results), key=lambda result: _ORDER[result.spec.method.name])
    names = labels({trial.trial_id: trial.spec for trial in trials})
    return [Row(label=names[result.trial_id], result=result, base=base_of(result, trials)) for result in trials]


def best_first(rows: Sequence[Row]) -> list[Row]:
    """The rows by quality: ROUGE-L where any row has one, else the held-out loss; rows without one last, as they were.

    Seeds of one setting stand together, where the mean over them puts them.
    """
    answered = any(row.rouge_l.value is not None for row in rows)

    def quality(unit: SeedGroup) -> float:
        spread = unit.spread(lambda row: row.rouge_l.value if answered else row.eval_loss.value)
        return -math.inf if spread is None else spread.mean if answered else -spread.mean

    return [row for unit in sorted(units(rows), key=quality, reverse=True) for row in unit.rows]


def seed_groups(rows: Sequence[Row]) -> list[SeedGroup]:
    """The rows put together over seeds, in their order; empty if no spec was run with several seeds."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        plain = row.result.spec.plain()
        del plain["seed"]
        grouped.setdefault(json.dumps(plain, sort_keys=True), []).append(row)
    if len(grouped) == len(rows):
        return []
    firsts = [group[0].result for group in grouped.values()]
    names = labels({first.trial_id: first.spec for first in firsts}, without=("seed",))
    return [SeedGroup(label=names[group[0].trial_id], rows=tuple(group)) for group in grouped.values()]


def units(rows: Sequence[Row]) -> list[SeedGroup]:
    """What is compared: the rows over seeds, or each row alone where no spec was run with several seeds."""
    return seed_groups(rows) or [SeedGroup(label=row.label, rows=(row,)) for row in rows]


def is_base(result: TrialResult) -> bool:
    """Whether it is of the model without fine-tuning."""
    return result.spec.method.name == BASE_METHOD


def base_of(result: TrialResult, results: Iterable[TrialResult]) -> TrialResult | None:
    """The finished trial without fine-tuning that `result` is to be compared with, or None; of a warm start, None.

    It has the same model, tokenizer and data and was scored in the same way; of several, the one that shares most of
    the other settings, such as the seed.
    """
    if is_base(result) or result.spec.train.warm_start is not None:
        return None
    candidates = [
        other for other in results if is_base(other) and other.status == "finished" and _comparable(result, other)
    ]
    flat = flat_spec(result.spec)
    return max(
        candidates,
        key=lambda other: sum(flat.get(key) == value for key, value in flat_spec(other.spec).items()),
        default=None,
    )


def error_line(result: TrialResult) -> str:
    """The first line of why a trial ended."""
    lines = [line.strip() for line in (result.error or "").splitlines() if line.strip()]
    return lines[0] if lines else "no reason was recorded"


def _comparable(first: TrialResult, second: TrialResult) -> bool:
    a, b = first.spec, second.spec
    keys = (first.provenance.data_key, second.provenance.data_key)
    models = (first.provenance.model_fingerprint, second.provenance.model_fingerprint)
    return (
        (a.model.name, a.model.tokenizer, a.model.random_weights)
        == (b.model.name, b.model.tokenizer, b.model.random_weights)
        and a.data == b.data
        # The files behind equal settings, or the model behind a name, may have changed between two runs of a sweep.
        and (None in keys or keys[0] == keys[1])
        and (a.model.revision == b.model.revision if None in models else models[0] == models[1])
        and a.scored_as() == b.scored_as()
    )
