"""What a comparison starts from: the model, the rows and the machine as they are found, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.compare.candidates import Candidate, candidates, check_names
from ray_peft.errors import DataError, SpecError
from ray_peft.schedule.decide import Node
from ray_peft.spec import ModelSpec, is_local

if TYPE_CHECKING:
    from ray_peft.tasks.llm_sft.look import Look

FEWEST_ROWS = 48
"""Different usable rows without which no comparison can say anything."""

TEST_SHARE, MOST_TEST = 0.15, 500
VALIDATION_SHARE, MOST_VALIDATION = 0.1, 250

MOST_EPOCHS = 3

LONGEST = 2048
"""Most tokens of a row."""


@dataclass(frozen=True)
class Setup:
    """What all trials of a comparison share."""

    name: str
    model: str
    """A hub id, or an absolute path; so is `data`."""
    data: str
    look: Look
    metric: str
    """What decides the answer: of `Family.measure`."""
    nodes: tuple[Node, ...]
    methods: tuple[Candidate, ...]
    max_length: int
    max_new_tokens: int

    @property
    def on_gpu(self) -> bool:
        """Whether trials run on a GPU."""
        return any(node.gpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Trials that run at one time, each on a whole GPU, or on the CPU."""
        return max(1, sum(node.gpus for node in self.nodes))

    @property
    def answers(self) -> bool:
        """Whether rows are answered, and not only their loss taken."""
        return self.metric == "rouge_l"

    @property
    def different(self) -> int:
        """Usable rows, each counted once."""
        return self.look.usable - self.look.repeated

    @property
    def most_test(self) -> int:
        """Test rows at most."""
        return min(MOST_TEST, int(TEST_SHARE * self.different))

    @property
    def most_validation(self) -> int:
        """Validation rows at most."""
        return min(MOST_VALIDATION, int(VALIDATION_SHARE * self.different))

    @property
    def most_train(self) -> int:
        """Training rows at most: what is left, less some that repeat held-out rows or are too long."""
        return max(1, int(0.8 * (self.different - self.most_test - self.most_validation)))

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step: fewer on a CPU, where a step takes seconds."""
        return (16 if self.different >= 1000 else 8) if self.on_gpu else 4

    @property
    def most_steps(self) -> int:
        """Optimizer steps of three epochs."""
        return max(8, MOST_EPOCHS * self.most_train // self.batch_size)

    def space(
        self,
        *,
        rung: str,
        question: str,
        methods: Sequence[dict[str, Any]],
        steps: int,
        rows: tuple[int, int, int],
        evaluation: dict[str, Any],
        seed: int,
        **train: Any,
    ) -> dict[str, Any]:
        """A search space of this comparison as JSON-like data.

        Args:
            rung: ends its name.
            question: its description.
            methods: entries of the grid.
            steps: of a trial.
            rows: training, validation and test rows.
            evaluation: what is scored, and how.
            seed: of its trials.
            train: more settings of the training.
        """
        source: dict[str, int | float] = dict(zip(("train", "validation", "test"), rows, strict=True))
        if 10 * source["train"] >= 9 * self.most_train:
            source["train"] = 1.0  # all others: a count might ask for more than is left
        return {
            "name": f"{self.name}, {rung}",
            "description": question,
            "tracking": {"experiment": self.name},
            "task": "llm_sft",
            "model": {"name": self.model, "dtype": "bfloat16" if self.on_gpu else "float32"},
            "data": {
                "sources": [{"recipe": self.look.recipe, "path": self.data, **source}],
                "max_length": self.max_length,
                "too_long": "drop",
                "unusable": "skip",
                "contamination": {"action": "drop"},
            },
            "method": {"grid": list(methods)},
            "train": {
                "steps": steps,
                "batch_size": self.batch_size,
                "micro_batch_size": self.batch_size,
                **({"fit": "auto"} if self.on_gpu else {}),
                "warmup_ratio": 0.1,
                "precision": "bf16" if self.on_gpu else "fp32",
                **({"objective": "dpo"} if self.look.judged else {}),
                **train,
            },
            "evaluation": {**evaluation, "max_new_tokens": self.max_new_tokens, "batch_size": self.answered_at_once},
            "resources": {"gpus_per_worker": 1 if self.on_gpu else 0},
            "seed": seed,
        }

    @property
    def answered_at_once(self) -> int:
        """Prompts answered at a time."""
        return 64 if self.on_gpu else 16


@dataclass(frozen=True)
class Looked:
    """The model and the rows as they are found, whatever the machine."""

    model: str
    data: str
    look: Look
    metric: str
    """What decides the answer."""
    hidden_size: int | None
    """Of the model; None where its config does not say it."""
    positions: int
    """Most tokens that the model can see."""


def looked_at(model: str, data: str, methods: Sequence[str], metric: str | None) -> Looked:
    """Look at the model's config and tokenizer and at all rows; nothing is started for it.

    Args:
        model: a folder, or a hub id.
        data: a file, a folder of shards, or a hub id.
        methods: names.
        metric: what decides the answer; None leaves it to the rows.

    Raises:
        ModelError, DataError: there is no such model or file, or it cannot be used.
        SpecError: an unknown method, or a metric that the rows cannot have.
    """
    from ray_peft.tasks.llm_sft.files import local_files
    from ray_peft.tasks.llm_sft.look import look
    from ray_peft.tasks.llm_sft.model import load_config
    from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

    check_names(methods)
    for kind, path in (("MODEL", model), ("DATA", data)):
        _check_there(kind, path)
    _check_order(model, data)
    local_files(data)  # a missing file is told before the model is looked at
    config = load_config(ModelSpec(name=model)).get_text_config()
    rows = look(data, load_tokenizer(_any_trial(model, data)))
    if rows.usable - rows.repeated < FEWEST_ROWS:
        raise DataError(
            f"{data}: has {rows.usable - rows.repeated} different rows that can be used, of {rows.rows}; a "
            f"comparison needs {FEWEST_ROWS} or more"
        )
    decided_by = _metric(metric, rows, data)
    positions = int(getattr(config, "max_position_embeddings", LONGEST) or LONGEST)
    return Looked(model, data, rows, decided_by, getattr(config, "hidden_size", None), positions)


def set_up(looked: Looked, *, name: str, methods: Sequence[str], nodes: Sequence[Node]) -> Setup:
    """What follows from the model, the rows and the machines."""
    on_gpu = any(node.gpus for node in nodes)
    rows = looked.look
    longest = -(-rows.length(0.98 if on_gpu else 0.9) // 16) * 16
    new_tokens = min(rows.answer_length(0.95), 256 if on_gpu else 32)
    return Setup(
        name=name,
        model=_absolute(looked.model),
        data=_absolute(looked.data),
        look=rows,
        metric=looked.metric,
        nodes=tuple(nodes),
        methods=tuple(candidates(methods, on_gpu=on_gpu, hidden_size=looked.hidden_size)),
        max_length=max(32, min(longest, looked.positions - new_tokens, LONGEST)),
        max_new_tokens=max(4, new_tokens),
    )


def _metric(metric: str | None, rows: Look, data: str) -> str:
    """What decides the answer: of pairs reward accuracy, of other rows ROUGE-L or their loss.

    Raises:
        SpecError: another is asked for than the rows have.
    """
    usual = "reward_accuracy" if rows.judged else "rouge_l"
    if metric is None:
        return usual
    if (metric == "reward_accuracy") != rows.judged:
        kind = "pairs of a chosen and a rejected answer" if rows.judged else f"rows of recipe {rows.recipe}, no pairs"
        raise SpecError(f"--metric {metric}: {data} holds {kind}; leave it out, or use --metric {usual}")
    return metric


def _any_trial(model: str, data: str) -> Any:
    """A trial that names the model and the rows, for what is asked with one."""
    from ray_peft.spec import LlmTrialSpec

    return LlmTrialSpec.from_plain(
        {
            "model": {"name": model},
            "data": {"sources": [{"recipe": "messages", "path": data, "train": 1, "test": 1}]},
            "method": {"name": "none"},
            "train": {"steps": 1},
        }
    )


def _check_there(kind: str, path: str) -> None:
    """Refuse what looks like a path and is none, before a hub is asked for it.

    Raises:
        SpecError: there is no such file or folder.
    """
    parts = path.rstrip("/").split("/")
    hub_id = not is_local(path) and len(parts) == 2 and not Path(parts[0]).is_dir() and "." not in parts[0]
    if not Path(path).expanduser().exists() and (not hub_id or "\\" in path):
        beside = Path(path).expanduser().parent
        names = sorted(entry.name for entry in beside.iterdir())[:8] if beside.is_dir() else []
        there = f"; {beside} holds {', '.join(names)}" if names else ""
        raise SpecError(f"{kind}: {path}: no such file or folder, nor a hub id such as owner/name{there}")


def _check_order(model: str, data: str) -> None:
    """Refuse rows in place of the model, and the other way round.

    Raises:
        SpecError: they are.
    """
    usage = "the order is: ray-peft compare MODEL DATA"
    if Path(model).expanduser().is_file() and not model.lower().endswith(".gguf"):
        raise SpecError(f"MODEL: {model}: is a file; give a model's folder, a .gguf file or a hub id; {usage}")
    if (Path(data).expanduser() / "config.json").is_file():
        raise SpecError(f"DATA: {data}: holds a model (config.json); give a file or a folder of rows; {usage}")


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if is_local(name) else name


def short(path: str) -> str:
    """A model's or a file's name without its folders and ending."""
    name = path.rstrip("/").rpartition("/")[2]
    return name.removesuffix(".gz").rsplit(".", 1)[0] if Path(path).is_file() else name
