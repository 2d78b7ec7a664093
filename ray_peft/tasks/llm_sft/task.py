"""The task `llm_sft`: instruction tuning of a causal language model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from ray_peft.errors import ModelError, first_line
from ray_peft.gpus import Gpu, known
from ray_peft.methods.base import Dtype, Stage, Task
from ray_peft.result import Sample, Scores
from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.spec.identity import Content
from ray_peft.tasks.base import (
    Bench,
    DataReport,
    EnsembleBench,
    Inspection,
    MemberModel,
    Report,
    Scored,
    TaskType,
    Trained,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.data import PreparedData
    from ray_peft.vram import Prediction


class LlmSft(TaskType[LlmTrialSpec]):
    """Conversations in, a model that answers out."""

    name: ClassVar[Task] = "llm_sft"

    def inspect(self, spec: LlmTrialSpec) -> Inspection:
        """Load config and tokenizer, find the benchmarks and their data, and prepare the rows."""
        from ray_peft.tasks.llm_sft import benchmarks, counts, data, decoding, ensemble, fits, model, targets

        for trial in (spec, *spec.members()):
            model.check(trial.model)
        reach = targets.check(spec)
        benchmarks.check(spec)
        ensemble.check_members(spec)
        prepared = _rows_to_look_at(spec)
        cautions = counts.cautions(prepared.facts)
        for own in {part.model.name: part.model for part in (spec, *spec.members())}.values():
            cautions += fits.check(spec, own, model.load_config(own), prepared)
            cautions += decoding.cautions(own) if spec.evaluation.generate else []
        notes = data.notes(prepared, spec.data) + [f"caution: {caution}" for caution in cautions]
        return Inspection(notes, prepared.key, len(prepared.train), reach)

    def model_content(self, model: ModelSpec) -> str | None:
        """Of its folder; null if its own code may read anything, or it is not here."""
        from ray_peft.tasks.llm_sft import deciding

        return deciding.model_content(model)

    def content(self, spec: LlmTrialSpec) -> str | None:
        """Of models, tokenizers, rows and chat template; null with benchmarks, which lm-eval reads from anywhere."""
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
        """Lengths and token numbers against the models' configs; weights are not looked at."""
        from ray_peft.tasks.llm_sft import fits, model

        said = []
        for own in {part.model.name: part.model for part in (spec, *spec.members())}.values():
            try:
                config = model.load_config(own)
            except ModelError as error:  # rows can be looked at with a tokenizer alone
                said.append(f"the rows were not compared with the model: {first_line(error)}")
            else:
                said += fits.check(spec, own, config, _rows_to_look_at(spec))
        return said

    def write_data(self, spec: LlmTrialSpec, folder: Path) -> list[Path]:
        """Write each split as JSON lines, and a few training rows of each source as the model sees them."""
        from ray_peft.tasks.llm_sft import describe

        return describe.write(spec, folder)

    def predictor(self, spec: LlmTrialSpec) -> Callable[[LlmTrialSpec, Gpu], Prediction]:
        """The peak with passes as long as the longest training row, or as `data.max_length` of a variant."""
        return _predictor(spec, _rows_to_look_at(spec))

    def total_steps(self, spec: LlmTrialSpec, train_rows: int) -> int:
        """Optimizer steps of a whole trial; the last one of an epoch may hold fewer rows."""
        if spec.train.steps is not None:
            return spec.train.steps
        assert spec.train.epochs is not None
        return max(1, math.ceil(spec.train.epochs * math.ceil(train_rows / spec.train.batch_size)))

    def load(self, spec: LlmTrialSpec, device: str) -> Bench:
        """Rows and model for one trial; random state is that of `spec.seed`."""
        from transformers import set_seed

        from ray_peft.tasks.llm_sft import model

        tokenizer, prepared = _rows(spec)
        set_seed(spec.seed)
        return LlmBench(spec, device, tokenizer, prepared, model.load_model(spec, device))

    def load_trained(self, spec: LlmTrialSpec, weights: Path, device: str) -> Bench:
        """The model with a trained adapter, or with trained weights."""
        from ray_peft.tasks.llm_sft import ensemble

        tokenizer, prepared = _rows(spec)
        (loaded,) = ensemble.load_members([MemberModel(spec, weights)], device)
        return LlmBench(spec, device, tokenizer, prepared, loaded.model)

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


_looked_at: dict[str, PreparedData] = {}
_MOST_LOOKED_AT = 4


def _rows_to_look_at(spec: LlmTrialSpec) -> PreparedData:
    """A trial's prepared rows, kept for the next trial on the same ones: a large tokenizer takes seconds to read."""
    from ray_peft.tasks.cache import cache_folder

    decides = [str(cache_folder()), spec.model.plain(), spec.data.plain(), spec.train.loss, _stamps(spec)]
    key = json.dumps(decides, sort_keys=True)
    if key not in _looked_at:
        _, found = _rows(spec)
        while len(_looked_at) >= _MOST_LOOKED_AT:
            _looked_at.pop(next(iter(_looked_at)))
        _looked_at[key] = found
    return _looked_at[key]


def _stamps(spec: LlmTrialSpec) -> list[tuple[str, int, int]]:
    """Times and sizes of all local files that decide a trial's rows."""
    named = [spec.model.tokenizer or spec.model.name, spec.data.chat_template]
    named += [path for source in spec.data.sources for path in (source.path, source.test_path)]
    files: list[Path] = []
    for path in map(Path, filter(None, named)):
        files += sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]


def _predictor(spec: LlmTrialSpec, rows: PreparedData) -> Callable[[LlmTrialSpec, Gpu], Prediction]:
    """Predicts a trial's peak memory, with passes as long as the longest rows that it trains on, and that it scores."""
    from ray_peft.tasks.llm_sft.lanes import largest_capacity
    from ray_peft.tasks.llm_sft.model import load_config
    from ray_peft.vram import ModelShape, predict

    shape = ModelShape.from_config(load_config(spec.model))
    trained, scored = max(map(len, rows.train["input_ids"])), rows.facts.longest

    def of(variant: LlmTrialSpec, gpu: Gpu) -> Prediction:
        limit = variant.data.max_length
        longest, longest_scored = min(trained, limit), min(scored, limit)
        if variant.train.cuda_graphs:
            longest = largest_capacity(longest)
        return predict(variant, shape, longest_tokens=longest, longest_scored=longest_scored, gpu=gpu)

    return of


class LlmBench(Bench):
    """A causal language model, its tokenizer and its rows."""

    def __init__(
        self,
        spec: LlmTrialSpec,
        device: str,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        model: PreTrainedModel,
    ) -> None:
        from ray_peft.tasks.llm_sft.model import fingerprint
        from ray_peft.tasks.parameters import held_weights

        self.spec = spec
        self.device = device
        self.tokenizer = tokenizer
        self.data = data
        self.model = model
        self.held = held_weights(model)
        self.lowered = {}
        self.data_key = data.key
        self.model_fingerprint = fingerprint(spec.model)

    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return LlmSft().total_steps(self.spec, len(self.data.train))

    def parameters(self) -> tuple[int, int]:
        """Parameters that take gradients, and all parameters."""
        from ray_peft.tasks.parameters import count_parameters

        return count_parameters(self.model)

    def dtypes(self) -> set[str]:
        """The dtypes of its weights and of its matrix products."""
        from ray_peft.tasks.parameters import computed_in

        return computed_in(self.spec, self.model)

    def storage(self) -> dict[str, int]:
        """Bytes of the model as it was loaded, by how they are held."""
        return self.held.num_bytes

    def four_bit_share(self) -> float | None:
        """Share of the model's weights that are in 4 bits; None where it is not quantised."""
        return self.held.four_bit_share if self.spec.quantization is not None else None

    def predicted(self) -> Prediction:
        """The peak with passes as long as the longest training row, on the GPU that is here."""
        from ray_peft.measure import device_name

        return _predictor(self.spec, self.data)(self.spec, known(device_name(self.device)))

    def attach(self, stage: Stage) -> None:
        """Prepare the model for a stage, from the trial's seed."""
        from transformers import set_seed

        set_seed(self.spec.seed)
        self.model = cast("PreTrainedModel", stage.attach(self.model))

    def train(self, stage: Stage, steps: int, first_step: int, folder: Path, report: Report) -> Trained:
        """Train the attached stage."""
        from ray_peft.engine.member import Job
        from ray_peft.tasks.llm_sft import train, trl_engine
        from ray_peft.tasks.llm_sft.routers import setting_kept

        job = Job(
            self.spec, stage, steps, first_step, folder, self.device, report, self.eval_loss,
            lowered=self.lowered, costs=self.costs,
        )  # fmt: skip
        given = (self.spec, job, self.data.train, self.model, self.tokenizer)
        if self.spec.train.engine == "trl":
            with setting_kept(self.model):
                return trl_engine.train_stage(*given)
        return train.train_stage(*given, rehearse=self.device != "cpu")

    def restore(self, folder: Path) -> None:
        """Load a saved adapter into the attached one."""
        from ray_peft.tasks.parameters import load_adapter

        load_adapter(self.model, folder, self.device)

    def merge(self, stage: Stage) -> None:
        """Fold what the stage trained into plain weights."""
        self.model = cast("PreTrainedModel", stage.merge(self.model))

    def eval_loss(self) -> float:
        """Mean loss of the held-out answers' tokens [nats]."""
        return -float(self.answer_log_probs().mean())

    def answer_log_probs(self) -> Tensor:
        """Log-probabilities of all held-out answers' tokens (answer tokens,), the longest row first."""
        from ray_peft.tasks.llm_sft.evaluate import token_log_probs

        pad = cast(int, self.tokenizer.pad_token_id)
        return token_log_probs(self.spec, self.model, self.data.test, pad, self.lowered)

    def answer(self, rows: Dataset) -> list[str]:
        """Greedy answers to the rows' prompts."""
        from ray_peft.tasks.llm_sft.evaluate import answers

        return answers(self.spec, self.model, self.tokenizer, rows, lowered=self.lowered)

    def evaluate(self) -> Scored:
        """Loss, BLEU-4, ROUGE-L and chrF on the held-out rows."""
        from ray_peft.tasks.llm_sft.scores import row_losses, score_answers

        log_probs, count = self.answer_log_probs(), len(self.data.test)
        loss = -float(log_probs.mean())
        losses, tokens = row_losses(self.data.test, log_probs)
        if not self.spec.evaluation.generate:
            return Scored(Scores(eval_loss=loss, eval_rows=count), losses=losses, loss_tokens=tokens)
        rows = self.data.test.select(range(min(self.spec.evaluation.rows or count, count)))
        predictions, references = self.answer(rows), list(rows["reference"])
        samples = [
            Sample(
                row=index,
                source_dataset=rows[index]["source_dataset"],
                prompt=rows[index]["prompt"],
                reference=references[index],
                answer=predictions[index],
            )
            for index in range(min(self.spec.evaluation.samples, len(rows)))
        ]
        scores = score_answers(predictions, references).model_copy(update={"eval_loss": loss, "eval_rows": count})
        answered = list(zip(predictions, references, strict=True))
        return Scored(scores, samples, answered, losses=losses, loss_tokens=tokens)

    def benchmark(self, scored: Scored) -> Scored:
        """`scored` with what the lm-eval tasks in `evaluation.benchmarks` say."""
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
