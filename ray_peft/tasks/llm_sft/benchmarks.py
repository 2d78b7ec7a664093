"""Further benchmarks: tasks of EleutherAI's lm-eval, an optional dependency, that the trained model is scored on."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.errors import DataError, SpecError, first_line
from ray_peft.spec import BenchmarksSpec, LlmTrialSpec
from ray_peft.tasks.base import Scored
from ray_peft.tasks.llm_sft.benchmark_results import by_question, collect
from ray_peft.tasks.llm_sft.decoding import end_of_answers, greedy
from ray_peft.tasks.llm_sft.task_files import python_in

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INSTALL = 'pip install "ray-peft[benchmarks]"'
KEY = "evaluation.benchmarks"
BATCH = f"{KEY}.batch_size"
"""A key of `Bench.lowered`."""
BOOTSTRAPS = 1000
"""Resamples behind a standard error that has no formula, such as that of a perplexity."""


@dataclass(frozen=True)
class Mixture:
    """How several models answer as one."""

    log_probs: Callable[[Tensor], Tensor]
    """From (row, token) ids to (row, token, vocab) log-probabilities of each next token."""
    processor: Callable[[Tensor], LogitsProcessor]
    """Given the attention mask of a batch of prompts, what turns the first model's scores into the mixture's."""


def check(spec: LlmTrialSpec) -> None:
    """Find every benchmark and its data, before a GPU is taken.

    Raises:
        SpecError: lm-eval is not installed; a task is unknown, is named twice, needs images or sound, or executes code
            without permission; or the folder of the user's own tasks is missing.
        DataError: a task's data set cannot be loaded here.
    """
    benchmarks = spec.evaluation.benchmarks
    if benchmarks is not None:
        with _task_manager(benchmarks) as manager:
            _load(benchmarks, manager)


def measure(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scored: Scored,
    mixture: Mixture | None = None,
    *,
    lowered: dict[str, int] | None = None,
) -> Scored:
    """`scored` with the scores of the benchmarks and of each of their questions.

    Where memory runs out, the questions of one kind of one task are repeated, half as many at a time.

    Args:
        spec: names the tasks and the precision.
        model: in evaluation mode; for a mixture, the first member's model, with its adapter active.
        tokenizer: of the model; it is not changed.
        scored: the scores so far.
        mixture: of an ensemble; None for a single model.
        lowered: `Bench.lowered`, read and written at `BATCH`; None remembers nothing.

    Raises:
        torch.OutOfMemoryError: a single question does not fit.
        SpecError, DataError: as `check`, on a worker that lacks something that the driver has.
    """
    benchmarks = spec.evaluation.benchmarks
    assert benchmarks is not None
    with _task_manager(benchmarks) as manager, greedy(model, tokenizer, end_of_answers(spec, tokenizer)):
        from lm_eval import simple_evaluate

        output = simple_evaluate(
            model=_language_model(spec, model, tokenizer, mixture, {} if lowered is None else lowered),
            tasks=_load(benchmarks, manager),
            task_manager=manager,
            num_fewshot=benchmarks.num_fewshot,
            limit=benchmarks.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            confirm_run_unsafe_code=benchmarks.allow_code_execution,
        )
    values, errors, rows = collect(output["results"])
    update = {"benchmarks": values, "benchmark_stderr": errors, "benchmark_rows": rows}
    questions = by_question(output["results"], output["samples"], output["group_subtasks"])
    return replace(scored, scores=scored.scores.model_copy(update=update), questions=questions)


@contextlib.contextmanager
def _task_manager(benchmarks: BenchmarksSpec) -> Iterator[Any]:
    """lm-eval's task manager, which knows all tasks of the trial, in the environment that it needs."""
    if benchmarks.include_path is not None and not Path(benchmarks.include_path).is_dir():
        raise SpecError(
            f"{KEY}.include_path: {benchmarks.include_path}: no such folder; give one with task files (*.yaml)"
        )
    if benchmarks.include_path is not None and not benchmarks.allow_code_execution:
        _check_no_python(Path(benchmarks.include_path))
    _require_lm_eval()
    manager = _task_index(benchmarks)
    for name in benchmarks.tasks:
        if name not in manager.task_index:
            raise SpecError(_unknown_task(name, manager.all_tasks))
    with _environment(benchmarks):
        yield manager


def _check_no_python(folder: Path) -> None:
    """Raise SpecError if a task file in the folder, or one that it includes, names Python code."""
    if (python := python_in(folder)) is not None:
        file, line, value = python
        raise SpecError(
            f"{KEY}.include_path: {file}: line {line}: {value} runs Python code when the file is read; look at it, "
            f"then set {KEY}.allow_code_execution: true (found false), or take the file out of the folder"
        )


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise SpecError(
            f"{KEY}: needs lm-eval, which cannot be imported here ({first_line(error)}); install it with: {INSTALL}, "
            f"or set {KEY}: null"
        ) from None


def _task_index(benchmarks: BenchmarksSpec) -> Any:
    """lm-eval's index of task files: its own, and those of the folder."""
    folder = benchmarks.include_path
    files = sorted(Path(folder).rglob("*.yaml")) if folder is not None else []
    return _read_task_index(folder, tuple((str(file), file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=2)  # reading 15,000 files takes up to 11 s, and a process runs many trials
def _read_task_index(folder: str | None, files: tuple[tuple[str, int], ...]) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=folder)


def _unknown_task(name: str, task_names: list[str]) -> str:
    near = difflib.get_close_matches(name, task_names, n=3, cutoff=0.6)
    # Most names of a family are longer than what people type, such as arc for arc_easy.
    near += sorted((other for other in task_names if name and name in other and other not in near), key=len)[
        : 3 - len(near)
    ]
    suggestion = f"did you mean {', '.join(near)}?" if near else "no name is like it"
    return (
        f"{KEY}.tasks: {name}: lm-eval knows {len(task_names):,} tasks, groups and tags here, but not this one; "
        f"{suggestion} Tasks of your own: a folder with their *.yaml files in {KEY}.include_path"
    )


def _load(benchmarks: BenchmarksSpec, manager: Any) -> list[Any]:
    """Every group and every task outside one, built, which reads its data set.

    Raises:
        SpecError, DataError: a task cannot be run.
    """
    owners: dict[str, str] = {}
    built_tasks: list[Any] = []
    for name in benchmarks.tasks:
        unsafe = _unsafe_task(manager.task_index, name)
        if unsafe and not benchmarks.allow_code_execution:
            raise SpecError(_needs_code_execution(name, unsafe))
        try:
            with contextlib.chdir(benchmarks.include_path or "."):  # where paths in one's own task files start
                loaded = manager.load([name])
        except Exception as error:  # data sets, hub clients and task files raise a dozen unrelated types
            raise DataError(_unloadable(manager.task_index, name, error)) from None
        group = loaded["groups"].get(name)
        built_tasks += [group] if group is not None else loaded["tasks"].values()
        for task, built in loaded["tasks"].items():
            if task in owners:
                raise SpecError(f"{KEY}.tasks: {owners[task]} and {name} both hold task {task}; ask for one of them")
            owners[task] = name
            if getattr(built, "MULTIMODAL", False):
                raise SpecError(f"{KEY}.tasks: {task} shows images or plays sound, which a text model cannot take")
            if getattr(built, "UNSAFE_CODE", False) and not benchmarks.allow_code_execution:
                raise SpecError(_needs_code_execution(name, task))
    return built_tasks


def _unsafe_task(index: Mapping[str, Any], name: str) -> str | None:
    """The first task below `name` that says that it executes code; found without building it."""
    return next((leaf for leaf in _leaves(index, name) if (index[leaf].cfg or {}).get("unsafe_code")), None)


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of the index that a task, group or tag stands for."""
    entry = index.get(name)
    if entry is None:
        return
    members = (entry.cfg or {}).get("task") if entry.cfg else sorted(entry.tags)
    if not isinstance(members, list):
        yield name
        return
    for member in members:
        inner = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(inner, str) and inner != name:
            yield from _leaves(index, inner)


def _needs_code_execution(name: str, task: str) -> str:
    subject = name if name == task else f"{name} holds {task}, which"
    return (
        f"{KEY}.tasks: {subject} executes the code that the model writes, on the worker and without a sandbox; "
        f"set {KEY}.allow_code_execution: true (found false) if that is what you want, or leave it out"
    )


def _unloadable(index: Mapping[str, Any], name: str, error: Exception) -> str:
    sources = {(index[leaf].cfg or {}).get("dataset_path") for leaf in _leaves(index, name)}
    where = ", ".join(sorted(source for source in sources if isinstance(source, str)))
    offline = [flag for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(flag, "0") not in ("", "0")]
    return (
        f"{KEY}.tasks: {name} cannot be loaded: {type(error).__name__}: {first_line(error).rstrip('.')}. Its data set"
        f"{f' ({where})' if where else ''}, and its metric if that is of the hub, must be in the cache of Hugging Face "
        f"or the hub in reach{f' ({offline[0]} is set)' if offline else ''}; rows on this machine: a task with "
        f"dataset_path: json in "
        f"{KEY}.include_path"
    )


@contextlib.contextmanager
def _environment(benchmarks: BenchmarksSpec) -> Iterator[None]:
    """lm-eval's environment: quiet, in one process, with permission to execute code if the trial gives it."""
    # DISABLE_MULTIPROC: lm-eval would fork a process per core to bootstrap, from a process that holds a GPU.
    variables = {"DISABLE_MULTIPROC": "1"} | ({"HF_ALLOW_CODE_EVAL": "1"} if benchmarks.allow_code_execution else {})
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with _quiet():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings on its own task files."""
    lm_eval_logger = logging.getLogger("lm_eval")
    level = lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lm_eval_logger.setLevel(level)


def _language_model(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture | None,
    lowered: dict[str, int],
) -> Any:
    """The model in the form that lm-eval calls."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Fitting(HFLM):  # type: ignore[misc]  # lm-eval ships no types
        """HFLM looks for a batch that fits only if asked for "auto"; both methods are where it makes batches."""

        batch_size_per_gpu: int

        def _loglikelihood_tokens(self, *args: Any, **more: Any) -> Any:
            ask = super()._loglikelihood_tokens
            return self._fitting(lambda: ask(*args, **more))

        def generate_until(self, *args: Any, **more: Any) -> Any:
            ask = super().generate_until
            return self._fitting(lambda: ask(*args, **more))

        def _fitting(self, ask: Callable[[], Any]) -> Any:
            """The longest questions come first, so few are repeated."""
            while True:
                size = self.batch_size_per_gpu
                try:
                    return ask()
                except RuntimeError as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                free_memory(str(self.device))
                self.batch_size_per_gpu = lowered[BATCH] = size // 2
                logger.warning("%s: %d at a time ran out of memory; going on with %d", BATCH, size, size // 2)

    class Mixed(Fitting):
        """Several models behind one; both methods are where HFLM asks its model."""

        def _model_call(self, inps: Tensor, *others: object, **more: object) -> Tensor:
            assert mixture is not None
            return mixture.log_probs(inps)

        def _model_generate(self, *args: Any, **settings: Any) -> Any:
            assert mixture is not None
            processors = [mixture.processor(settings["attention_mask"])]
            return super()._model_generate(*args, **settings, logits_processor=processors)

    benchmarks = spec.evaluation.benchmarks
    return (Fitting if mixture is None else Mixed)(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets its padding
        batch_size=lowered.get(BATCH, benchmarks.batch_size if benchmarks else 1),
        # HFLM opens an autocast of its own around the model, and None would switch ours off.
        mixed_precision_dtype=torch.bfloat16 if spec.train.precision == "bf16" else None,
        # Else the log-probabilities of bf16 logits are summed in bf16, which has three digits.
        softmax_dtype=torch.float32,
    )
