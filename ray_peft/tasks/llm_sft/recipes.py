"""Recipes: one row of a data set -> a conversation (or plain text), by the field rules of its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_peft.tasks.llm_sft.chat import messages
from ray_peft.tasks.llm_sft.conversation import Conversation, Turn, Unusable, WrongShape
from ray_peft.tasks.llm_sft.fields import text_of
from ray_peft.tasks.llm_sft.judged import labelled, preference

__all__ = ["RECIPES", "Conversation", "Turn", "Unusable", "WrongShape"]


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """Stanford Alpaca: instruction, input (appended as "Input: ..." when there is one), output."""
    question = text_of(row, "instruction")
    extra = text_of(row, "input", default="")
    return _pair(f"{question}\n\nInput: {extra}" if extra else question, text_of(row, "output"))


def dolly(row: Mapping[str, Any]) -> Conversation:
    """Databricks Dolly: instruction, context (put after the instruction when there is one), response."""
    question = text_of(row, "instruction")
    context = text_of(row, "context", default="")
    return _pair(f"{question}\n\n{context}" if context else question, text_of(row, "response"))


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """One question and one answer: prompt, completion."""
    return _pair(text_of(row, "prompt"), text_of(row, "completion"))


def text(row: Mapping[str, Any]) -> Conversation:
    """Plain text without turns: text."""
    content = text_of(row, "text")
    if not content:
        raise Unusable("empty text")
    return Conversation(text=content)


RECIPES: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "tulu": messages,
    "ultrachat": messages,
    "messages": messages,
    "prompt_completion": prompt_completion,
    "preference": preference,
    "labelled": labelled,
    "text": text,
}


def _pair(question: str, answer: str) -> Conversation:
    if not question:
        raise Unusable("empty question")
    if not answer:
        raise Unusable("empty answer")
    return Conversation(turns=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
