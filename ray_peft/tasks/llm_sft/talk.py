"""Conversations of a person with fine-tuned models, each with its own, on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ray_peft.errors import DataError, SpecError
from ray_peft.spec import LlmTrialSpec, TrialSpec
from ray_peft.tasks.base import MemberModel
from ray_peft.tasks.llm_sft.conversation import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.encode import Encoder
    from ray_peft.tasks.llm_sft.ensemble import LoadedMember


@dataclass
class _Speaker:
    spec: LlmTrialSpec
    member: LoadedMember
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    most_tokens: int
    """Positions of its model."""
    turns: list[Turn] = field(default_factory=list)


class Talk:
    """The models of several trials; those with the same base share it."""

    def __init__(self, members: Sequence[MemberModel[TrialSpec]], device: str, max_new_tokens: int) -> None:
        """Load the models.

        Args:
            members: the trials with the folders of their weights.
            device: "cpu" or "cuda:N".
            max_new_tokens: most tokens of an answer.

        Raises:
            SpecError: a trial trains no language model on conversations.
            ModelError: weights cannot be loaded.
        """
        from ray_peft.tasks.llm_sft.encode import Encoder
        from ray_peft.tasks.llm_sft.ensemble import load_members
        from ray_peft.tasks.llm_sft.model import load_config
        from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

        language_models = [
            MemberModel(member.spec, member.weights) for member in members if isinstance(member.spec, LlmTrialSpec)
        ]
        if len(language_models) < len(members):
            raise SpecError("chat: only trials of language models can answer")
        self._speakers: list[_Speaker] = []
        loaded = load_members(language_models, device)
        for member, model in zip(language_models, loaded, strict=True):
            spec = member.spec.changed({"evaluation.max_new_tokens": max_new_tokens})
            tokenizer = load_tokenizer(spec)
            if tokenizer.chat_template is None:
                raise SpecError(f"chat: {member.spec.model.name} has no chat template, so it was not taught to answer")
            config: Any = load_config(spec.model).get_text_config()
            positions = int(getattr(config, "max_position_embeddings", 0) or 2**20)
            encoder = Encoder(tokenizer, spec.data.template_date, spec.data.special_tokens)
            self._speakers.append(_Speaker(spec, model, tokenizer, encoder, positions))

    def forget(self) -> None:
        """Begin new conversations."""
        for speaker in self._speakers:
            speaker.turns.clear()

    def answers(self, question: str) -> list[str]:
        """The greedy answer of each model to a question after what was said before, in the order of the trials.

        Raises:
            DataError: a conversation has no room for another answer.
        """
        return [self._answer(speaker, question) for speaker in self._speakers]

    def _answer(self, speaker: _Speaker, question: str) -> str:
        from ray_peft.tasks.llm_sft import evaluate

        turns = [*speaker.turns, {"role": "user", "content": question}]
        conversation = Conversation(
            (*turns, {"role": "assistant", "content": "-"})
        )  # what the answer is says nothing here
        prompt = speaker.encoder.question(conversation)["prompt_ids"]
        room = speaker.most_tokens - speaker.spec.evaluation.max_new_tokens
        if len(prompt) > room:
            raise DataError(f"the conversation has {len(prompt)} tokens, and {room} leave room for an answer; /new")
        with speaker.member.at_work() as model:
            (text,) = evaluate.answers(speaker.spec, model, speaker.tokenizer, cast(Any, {"prompt_ids": [prompt]}))
        speaker.turns = [*turns, {"role": "assistant", "content": text}]
        return text
