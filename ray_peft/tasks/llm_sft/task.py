"""The task `llm_sft`: instruction tuning of a causal language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from ray_peft.errors import ModelError, first_line
from ray_peft.methods.base import ENOUGH_STEPS, Task
from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.spec.identity import Content
from ray_peft.tasks.base import (
    Bench,
    DataReport,
    EnsembleBench,
    Further,
    Inspection,
    MemberModel,
    PackEnded,
    PackForecast,
    PackTrial,
    TaskType,
    Workload,
)
from ray_peft.tasks.llm_sft import bench
from ray_peft.vram.cards import Gpu

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.data import PreparedData
    from ray_peft.vram import Prediction


class LlmSft(TaskType[LlmTrialSpec]):
    """Conversations in, a model that answers out."""

    name: ClassVar[Task] = "llm_sft"
    model_file: ClassVar[str] = "config.json"

    def inspect(self, spec: LlmTrialSpec) -> Inspection:
        """Load config and tokenizer, find the benchmarks and their data, and prepare the rows."""
        from ray_peft.metrics.own_metrics import load
        from ray_peft.tasks.llm_sft import benchmarks, counts, data, decoding, ensemble, fits, grown, model, targets
        from ray_peft.tasks.llm_sft.preference import rows as preference_rows

        for trial in (spec, *spec.members()):
            model.check(trial.model)
        reach = targets.check(spec)
        benchmarks.check(spec)
        for path in spec.evaluation.metrics:
            load(path)
        ensemble.check_members(spec)
        prepared = _inspected_rows(spec)
        cautions = counts.cautions(prepared.facts) + preference_rows.cautions(spec, prepared.train)
        for model_spec in {part.model.name: part.model for part in (spec, *spec.members())}.values():
            config = grown.grown_config(model_spec, model.load_config(model_spec))
            cautions += fits.check(spec, model_spec, config, prepared)
            cautions += decoding.cautions(model_spec) if spec.evaluation.generate else []
        cautions += grown.cautions(spec.model, prepared.train)
        notes = data.notes(prepared, spec.data) + [f"caution: {caution}" for caution in cautions]
        return Inspection(notes, prepared.key, len(prepared.train), reach)

    def model_content(self, model: ModelSpec) -> str | None:
        """Digest of its folder; None if the model brings code of its own, or is not here."""
        from ray_peft.tasks.llm_sft import deciding

        return deciding.model_content(model)

    def content(self, spec: LlmTrialSpec) -> str | None:
        """Digest of models, tokenizers, rows and chat template; None with benchmarks, whose files lm-eval chooses."""
        from ray_peft.tasks.llm_sft import deciding

        return deciding.content(spec)

    def is_prepared(self, spec: LlmTrialSpec, data_key: str) -> bool:
        """Whether the cache still holds the tokenised rows."""
        from ray_peft.tasks.llm_sft import content

        return (content.prepared_folder(spec.data, data_key) / "counts.json").is_file()

    def fingerprint(self, model: ModelSpec) -> str:
        """Content of a local model, commit of a hub model."""
        from ray_peft.tasks.llm_sft.model import fingerprint

        return fingerprint(model)

    def released(self, spec: LlmTrialSpec, row: LlmTrialSpec) -> Content:
        """The fingerprint and the data key of release 0.1.0."""
        from ray_peft.tasks.llm_sft import content, tokenizer

        return content.released(spec, row, tokenizer.load_tokenizer(spec))

    def data_report(self, spec: LlmTrialSpec) -> DataReport:
        """Prepare the rows and count them and their tokens."""
        from ray_peft.tasks.llm_sft import describe

        return describe.report(spec)

    def rows_fit(self, spec: LlmTrialSpec) -> list[str]:
        """Compare lengths and token numbers with the models' configs; weights are not read."""
        from ray_peft.tasks.llm_sft import fits, grown, model

        sentences = []
        for model_spec in {part.model.name: part.model for part in (spec, *spec.members())}.values():
            try:
                config = grown.grown_config(model_spec, model.load_config(model_spec))
            except ModelError as error:  # rows can be looked at with a tokenizer alone
                sentences.append(f"the rows were not compared with the model: {first_line(error)}")
            else:
                sentences += fits.check(spec, model_spec, config, _inspected_rows(spec))
        return sentences

    def write_data(self, spec: LlmTrialSpec, folder: Path) -> list[Path]:
        """Write each split as JSON lines, and a few training rows of each source as the model sees them."""
        from ray_peft.tasks.llm_sft import describe

        return describe.write(spec, folder)

    def predictor(self, spec: LlmTrialSpec) -> Callable[[LlmTrialSpec, Gpu], Prediction]:
        """The peak with passes as long as the longest training row, or as `data.max_length` of a variant."""
        return bench.predictor(spec, _inspected_rows(spec))

    def workload(self, spec: LlmTrialSpec) -> Workload:
        """The mean length of its training rows, and the held-out rows that it scores and answers."""
        return bench.workload(spec, _inspected_rows(spec))

    def total_steps(self, spec: LlmTrialSpec, train_rows: int) -> int:
        """Optimizer steps of a whole trial; the last one of an epoch may hold fewer rows."""
        return bench.total_steps(spec, train_rows)

    def base_key(self, spec: LlmTrialSpec, device: str) -> str | None:
        """Of trials that train adapters in one stage, or nothing."""
        from ray_peft.tasks.llm_sft import model

        return model.base_key(spec, device)

    def load(self, spec: LlmTrialSpec, device: str) -> Bench:
        """Rows and model for one trial; random state is that of `spec.seed`."""
        from transformers import set_seed

        from ray_peft.tasks.llm_sft import model

        tokenizer, prepared = _rows_of_last(spec)
        set_seed(spec.seed)
        base = model.load_model(spec, "cpu" if spec.sharded else device, self.base_key(spec, device))
        loaded = bench.LlmBench(spec, device, tokenizer, prepared, base)
        loaded.add_reference()
        if spec.sharded and not spec.method.stages(ENOUGH_STEPS):  # else once its stage is attached
            loaded.spread()
        return loaded

    def load_trained(self, spec: LlmTrialSpec, weights: Path, device: str) -> Bench:
        """The model with a trained adapter, or with trained weights."""
        from ray_peft.tasks.llm_sft import ensemble

        tokenizer, prepared = _rows(spec)
        (loaded,) = ensemble.load_members([MemberModel(spec, weights)], device)
        return bench.LlmBench(spec, device, tokenizer, prepared, loaded.model)

    def check_gguf(self, spec: LlmTrialSpec) -> None:
        """By the type of the model."""
        from ray_peft.tasks.llm_sft.gguf_file import check_config
        from ray_peft.tasks.llm_sft.model import load_config

        check_config(load_config(spec.model).to_dict())

    def write_gguf(self, folder: Path, file: Path) -> None:
        """As llama.cpp's own converter does."""
        from ray_peft.tasks.llm_sft.gguf_file import write_gguf

        write_gguf(folder, file)

    def bases(self, specs: Sequence[LlmTrialSpec]) -> list[list[LlmTrialSpec]]:
        """LoRA trials of one model and one precision share it."""
        from ray_peft.tasks.llm_sft import packable

        return packable.packs(specs)

    def follows(self, spec: LlmTrialSpec, others: Sequence[LlmTrialSpec]) -> bool:
        """If its adapter and its rows are no larger than theirs."""
        from ray_peft.tasks.llm_sft import packable

        alike = {_decides_rows(other) for other in others}
        return _decides_rows(spec) in alike and packable.fits_place(spec, others)

    def forecast(self, specs: Sequence[LlmTrialSpec], gpu: Gpu) -> PackForecast:
        """From the shape of the model and the lengths of the rows."""
        from ray_peft.tasks.llm_sft import forecast

        return forecast.of_pack(specs, [_inspected_rows(spec) for spec in specs], gpu)

    def load_pack(self, specs: Sequence[LlmTrialSpec], device: str) -> list[Bench]:
        """Rows of each trial, and one model for all.

        Raises:
            SpecError: they cannot train together.
        """
        from ray_peft.tasks.llm_sft import packable

        packable.check(specs)
        benches = [self.load(specs[0], device)]
        for spec in specs[1:]:
            benches.append(self.join_pack(benches, spec))
        return benches

    def join_pack(self, benches: Sequence[Bench], spec: LlmTrialSpec) -> Bench:
        """Its rows, on the model of the others.

        Raises:
            SpecError: it cannot train together with them.
        """
        from ray_peft.tasks.llm_sft import packable

        others = [cast(bench.LlmBench, other) for other in benches]
        packable.check([others[0].spec, spec])
        alike = next((other for other in others if _decides_rows(other.spec) == _decides_rows(spec)), None)
        rows = (alike.tokenizer, alike.data) if alike is not None else _rows(spec)  # to read them takes seconds
        further = bench.LlmBench(spec, others[0].device, *rows, others[0].model)
        further.add_reference()
        return further

    def train_pack(self, trials: Sequence[PackTrial], ended: PackEnded, further: Further = lambda: None) -> None:
        """Train LoRA adapters of all trials on their one base."""
        from ray_peft.tasks.llm_sft.pack import train_together

        train_together(trials, ended, further)

    def load_ensemble(self, spec: LlmTrialSpec, members: list[MemberModel[LlmTrialSpec]], device: str) -> EnsembleBench:
        """The members' models, each base held once."""
        from ray_peft.tasks.llm_sft import ensemble

        tokenizer, prepared = _rows(spec)
        return ensemble.LlmEnsemble(spec, device, tokenizer, prepared, ensemble.load_members(members, device))


def _rows(spec: LlmTrialSpec) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """A trial's tokenizer and prepared rows."""
    from ray_peft.tasks.llm_sft.data import prepare
    from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    return tokenizer, prepare(spec, tokenizer)


def _decides_rows(spec: LlmTrialSpec) -> str:
    """The settings that decide a trial's tokenizer and rows."""
    by_row = spec.train.objective == "kto"  # which takes pairs apart
    return json.dumps([spec.model.plain(), spec.data.plain(), spec.train.loss, by_row], sort_keys=True)


def _decides(spec: LlmTrialSpec) -> str:
    """What decides a trial's tokenizer and rows: its settings, where they are kept, and the files that they name."""
    from ray_peft.foundation.cache import cache_folder

    return json.dumps([str(cache_folder()), _decides_rows(spec), _stamps(spec)])


_last_rows: dict[str, tuple[PreTrainedTokenizerBase, PreparedData]] = {}
"""Of the trial that was loaded last in this process, by what decides them."""


def _rows_of_last(spec: LlmTrialSpec) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """A trial's tokenizer and prepared rows; those of the trial before where they are the same."""
    if spec.train.engine != "own" or spec.evaluation.benchmarks is not None:  # TRL and lm-eval change tokenizers
        return _rows(spec)
    key = _decides(spec)
    if key not in _last_rows:
        _last_rows.clear()
        _last_rows[key] = _rows(spec)
    return _last_rows[key]


_recent_rows: dict[str, PreparedData] = {}
_MOST_RECENT = 4


def _inspected_rows(spec: LlmTrialSpec) -> PreparedData:
    """A trial's prepared rows, kept for the next trial on the same ones: a large tokenizer takes seconds to read."""
    key = _decides(spec)
    if key not in _recent_rows:
        _, rows = _rows(spec)
        while len(_recent_rows) >= _MOST_RECENT:
            _recent_rows.pop(next(iter(_recent_rows)))
        _recent_rows[key] = rows
    return _recent_rows[key]


def _stamps(spec: LlmTrialSpec) -> list[tuple[str, int, int]]:
    """Times and sizes of all local files that decide a trial's rows."""
    named = [spec.model.tokenizer or spec.model.name, spec.data.chat_template]
    named += [path for source in spec.data.sources for path in (source.path, source.test_path)]
    files: list[Path] = []
    for path in map(Path, filter(None, named)):
        files += sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
