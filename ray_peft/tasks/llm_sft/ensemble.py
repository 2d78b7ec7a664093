"""Several fine-tuned models that choose each next token together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.trained import Report, Trained
from ray_peft.errors import ModelError, TrialFailed
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.base import Dtype, Stage
from ray_peft.methods.new_tokens import complete
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.base import EnsembleBench, MemberModel, Scored
from ray_peft.tasks.llm_sft.bench import LlmBench
from ray_peft.tasks.llm_sft.evaluate import Mixture, answers, bare, inference, token_log_probs
from ray_peft.tasks.one_model import ADAPTER_CONFIG

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.continuous import Voice
    from ray_peft.tasks.llm_sft.data import PreparedData

MOST_ROUNDS = 1000
CHANGE = 1e-7
"""Expectation maximisation ends when no weight moves by more than this in a round."""

LEAST = 1e-3
"""A member with less weight is left out: it would cost as much time as the others and change hardly any answer."""


def check_members(spec: LlmTrialSpec) -> None:
    """Check the models of an ensemble's members, without weights.

    Raises:
        ModelError: a member's model is missing, or has another tokenizer than the trial's own model.
    """
    from ray_peft.tasks.llm_sft.model import load_config
    from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

    own = None
    for place, member in enumerate(spec.members()):
        if member.model.name == spec.model.name:
            continue
        own = own or (load_tokenizer(spec), load_config(spec.model))
        other, config = load_tokenizer(member), load_config(member.model)
        where = f"method.members.{place}.model: {member.model.name}"
        if other.get_vocab() != own[0].get_vocab():
            raise ModelError(
                f"{where}: its tokenizer has {len(other)} tokens, that of {spec.model.name} has {len(own[0])}, and "
                "they are not the same; members of an ensemble choose one next token, so they must share a tokenizer"
            )
        if other.chat_template != own[0].chat_template:
            raise ModelError(
                f"{where}: its chat template is not that of {spec.model.name}, so its prompts would have another "
                "format than in its training; name one .jinja file for all in data.chat_template"
            )
        sizes = [model_config.get_text_config().vocab_size for model_config in (config, own[1])]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{where}: its output layer scores {sizes[0]} tokens, that of {spec.model.name} {sizes[1]}; "
                "members of an ensemble must score the same tokens"
            )


@dataclass(frozen=True)
class LoadedMember:
    """A member, and the model that it may share with other members."""

    model: PreTrainedModel
    adapter: str | None
    """Name of its adapter in `model`; None if it has none."""

    @contextlib.contextmanager
    def at_work(self) -> Iterator[PreTrainedModel]:
        """The model with this member's adapter switched on; afterwards with the adapter that was on before."""
        adapted = cast("PeftModel", self.model)
        if self.adapter is not None:
            before = adapted.active_adapter
            adapted.set_adapter(self.adapter)
            try:
                yield self.model
            finally:
                adapted.set_adapter(before)
        elif self.is_bare_base:
            with adapted.disable_adapter():
                yield self.model
        else:
            yield self.model

    def voice(self, weight: float) -> Voice:
        """This member as one model of a mixture, with its weight."""
        from ray_peft.tasks.llm_sft.continuous import Voice

        return Voice(bare(self.model), self.at_work, math.log(weight))

    @property
    def is_bare_base(self) -> bool:
        """True for an untouched base in whose model other members have adapters."""
        return self.adapter is None and hasattr(self.model, "peft_config")


def load_members(members: Sequence[MemberModel[LlmTrialSpec]], device: str) -> list[LoadedMember]:
    """Load every member; members with the same base in the same storage share it.

    Raises:
        ModelError: weights cannot be loaded.
    """
    from peft import PeftModel

    from ray_peft.tasks.llm_sft.model import from_folder, load_model

    bases: dict[str, Any] = {}
    keys: list[tuple[str, str | None]] = []
    for place, member in enumerate(members):
        spec, folder = member.spec, member.weights
        if folder is not None and not (folder / ADAPTER_CONFIG).is_file():
            key = f"member {place}"
            bases[key] = from_folder(spec.model, str(folder), spec.train.save_dtype, None, device)
            keys.append((key, None))
            continue
        dtype = spec.method.weights_dtype(spec.model.dtype)
        storage = spec.quantization.plain() if spec.quantization else None
        # Several LoRA adapters lie beside each other on one base; other kinds of PEFT's have it to themselves.
        # So do adapters with rows of new tokens, of which PEFT switches on one at a time.
        alone = isinstance(spec.method, Adapter) and (spec.method.peft_kind != "LORA" or bool(spec.model.new_tokens))
        key = repr((spec.model.plain(), dtype, storage, spec.trial_id if alone else None))
        if key not in bases:
            bases[key] = load_model(spec, device)
        if folder is None:
            keys.append((key, None))
            continue
        name = "default" if len(members) == 1 else spec.trial_id  # PEFT saves any other name into a folder below
        if isinstance(bases[key], PeftModel):
            bases[key].load_adapter(str(folder), adapter_name=name)
        else:
            bases[key] = PeftModel.from_pretrained(bases[key], str(folder), adapter_name=name)
            if bases[key].active_peft_config.peft_type == "ADALORA":  # PEFT 0.21 asks for it where labels are given
                bases[key].base_model.trainable_adapter_name = name
            complete(bases[key])
        keys.append((key, name))
    for base in bases.values():
        base.requires_grad_(False)
        base.eval()
    return [LoadedMember(bases[key], adapter) for key, adapter in keys]


def mixture_weights(log_probs: Tensor) -> list[float]:
    """Weights of a linear mixture that make the observed tokens most likely, by expectation maximisation.

    The likelihood is concave in the weights, so this converges to the best weights (Dempster et al. 1977).

    Args:
        log_probs: (member, token): each member's log-probability of every observed token.
    """
    import torch

    weights = torch.full((len(log_probs),), 1 / len(log_probs), dtype=torch.float64)
    for _ in range(MOST_ROUNDS):
        shares = torch.softmax(log_probs + weights.log()[:, None], dim=0)
        new = shares.mean(dim=1)
        largest_change = float((new - weights).abs().max())
        weights = new
        if largest_change < CHANGE:
            break
    weights[weights < LEAST] = 0
    return [float(weight) for weight in weights / weights.sum()]


class LlmEnsemble(LlmBench, EnsembleBench):
    """Members that answer together: p(token) = sum of weight x p of each member."""

    def __init__(
        self,
        spec: LlmTrialSpec,
        device: str,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        members: list[LoadedMember],
    ) -> None:
        super().__init__(spec, device, tokenizer, data, members[0].model)
        self.members = members
        self.weights = [1 / len(members)] * len(members)

    def parameters(self) -> tuple[int, int]:
        """(0, number of all parameters): nothing is trained, and a shared base counts once."""
        from ray_peft.tasks.parameters import count_parameters

        models = {id(member.model): member.model for member in self.members}
        return 0, sum(count_parameters(model)[1] for model in models.values())

    def tune(self) -> list[float]:
        """The weights under which the validation answers are most likely."""
        assert self.data.validation is not None  # LlmTrialSpec.problems() asks for validation rows
        self.weights = mixture_weights(self._log_probs(self.data.validation))
        return self.weights

    def log_probs(self, rows: Dataset) -> Tensor:
        """Log-probabilities of all answers' tokens of rows under the mixture (answer tokens,), longest row first."""
        import torch

        logs = torch.tensor([math.log(weight) if weight else -math.inf for weight in self.weights])
        return torch.logsumexp(self._log_probs(rows) + logs.double()[:, None], dim=0)

    def answer(self, rows: Dataset, ended: list[bool] | None = None) -> list[str]:
        """Greedy answers of the mixture, without the members whose weight is 0."""
        weighted = self._weighted_members()
        with self._ready(weighted[1:]), weighted[0][0].at_work() as model:
            mixture = Mixture([member.voice(weight) for member, weight in weighted], _mixer(weighted))
            return answers(self.spec, model, self.tokenizer, rows, mixture, lowered=self.lowered, ended=ended)

    def benchmark(self, scored: Scored) -> Scored:
        """`scored` with the lm-eval scores of the mixture, without the members whose weight is 0."""
        if self.spec.evaluation.benchmarks is None:
            return scored
        from ray_peft.tasks.llm_sft import benchmarks

        weighted = self._weighted_members()
        mixture = benchmarks.Mixture(partial(_mixed_log_probs, weighted), _mixer(weighted))
        with self._ready(weighted), weighted[0][0].at_work() as model:
            return benchmarks.measure(self.spec, model, self.tokenizer, scored, mixture, lowered=self.lowered)

    def _weighted_members(self) -> list[tuple[LoadedMember, float]]:
        """The members whose weight is not 0, with their weights."""
        weighted = [(member, weight) for member, weight in zip(self.members, self.weights, strict=True) if weight]
        # The bare base comes last: the adapters of members inside its context would be off, too.
        weighted.sort(key=lambda pair: pair[0].is_bare_base)
        return weighted

    @contextlib.contextmanager
    def _ready(self, weighted: Sequence[tuple[LoadedMember, float]]) -> Iterator[None]:
        """The members' models in evaluation mode."""
        with contextlib.ExitStack() as modes:
            for member, _ in weighted:
                modes.enter_context(inference(self.spec, member.model))
            yield

    def _log_probs(self, rows: Dataset) -> Tensor:
        """Log-probabilities (member, answer token) float64 of the answers of `rows`."""
        import torch

        log_probs, pad = [], cast(int, self.tokenizer.pad_token_id)
        for member in self.members:
            with member.at_work() as model:
                log_probs.append(token_log_probs(self.spec, model, rows, pad, self.lowered))
        return torch.stack(log_probs)

    def attach(self, stage: Stage) -> None:
        """Nothing is trained."""
        raise TrialFailed("an ensemble is not trained")

    def train(self, stage: Stage, steps: int, first_step: int, folder: Path, report: Report) -> Trained:
        """Nothing is trained."""
        raise TrialFailed("an ensemble is not trained")

    def restore(self, folder: Path) -> None:
        """Nothing is trained."""
        raise TrialFailed("an ensemble is not trained")

    def save(self, folder: Path, dtype: Dtype | None = None) -> None:
        """Nothing is saved: the members are."""


def _mixed_log_probs(members: Sequence[tuple[LoadedMember, float]], ids: Tensor) -> Tensor:
    """Log-probabilities (row, token, vocabulary) float32 of the mixture after each of `ids` (row, token)."""
    import torch

    mixed = []
    for member, weight in members:
        with member.at_work() as model:
            mixed.append(torch.log_softmax(model(ids).logits.float(), dim=-1) + math.log(weight))
    return torch.logsumexp(torch.stack(mixed), dim=0)


def _mixer(members: list[tuple[LoadedMember, float]]) -> Callable[[Tensor], LogitsProcessor]:
    """Makes the processor of a batch, which turns the first member's scores into those of the mixture."""
    import torch
    from transformers import LogitsProcessor

    others = members[1:]
    logs = [math.log(weight) for _, weight in members]

    class Mixer(LogitsProcessor):
        def __init__(self, mask: Tensor) -> None:
            self.mask = mask
            self.caches: list[Any] = [None] * len(others)
            self.cached_tokens = 0
            """Tokens that are in the caches."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            length = input_ids.shape[1]
            mask = torch.cat([self.mask, self.mask.new_ones((len(input_ids), length - self.mask.shape[1]))], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            mixed = [torch.log_softmax(scores.float(), dim=-1) + logs[0]]
            for place, (member, _) in enumerate(others):
                with member.at_work() as model:
                    output: Any = model(
                        input_ids=input_ids[:, self.cached_tokens :],
                        attention_mask=mask,
                        position_ids=positions[:, self.cached_tokens :],
                        past_key_values=self.caches[place],
                        use_cache=True,
                        logits_to_keep=1,
                    )
                self.caches[place] = output.past_key_values
                mixed.append(torch.log_softmax(output.logits[:, -1].float(), dim=-1) + logs[place + 1])
            self.cached_tokens = length
            return torch.logsumexp(torch.stack(mixed), dim=0)

    return Mixer
