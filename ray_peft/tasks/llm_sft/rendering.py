"""Whether a chat template shows all of a conversation: tool calls, tools, tools' results and reasoning.

Many templates print `message.content` and nothing else. A row whose tool calls they leave out would be half trained on,
so it is unusable with such a template, and is counted under that reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_peft.spec import DataSpec
from ray_peft.tasks.llm_sft.conversation import REASONING, Conversation, Turn, Unusable
from ray_peft.tasks.llm_sft.left_out import TEMPLATE
from ray_peft.tasks.llm_sft.rows import DrawnRows, draw
from ray_peft.tasks.llm_sft.turns import CannotWrite, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def draw_all(data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> list[DrawnRows]:
    """The rows of every source, of those that the tokenizer's chat template shows in full.

    Raises:
        DataError: a missing or malformed file, or too few usable rows.
    """
    ready = partial(as_rendered, tokenizer=tokenizer, answers_only=answers_only)
    return [draw(source, data.seed, data.unusable, ready) for source in data.sources]


def render(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generation_prompt: bool = False,
) -> str:
    """The text of turns, as the chat template writes it on a fixed day.

    Raises:
        CannotWrite: the template fails on them, or refuses them.
    """
    return Template(tokenizer).write(turns, tools=tools, ask=generation_prompt)


def as_rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> Conversation:
    """The conversation in the form that the chat template takes.

    Args:
        conversation: of one row.
        tokenizer: with the chat template.
        answers_only: whether the loss is that of answers; that of all tokens cannot leave one answer out.

    Raises:
        Unusable: the template leaves something of it out, refuses it, or rewrites its earlier turns.
    """
    if conversation.untrained and not answers_only and not conversation.rejected:
        raise Unusable("weight: 0 needs train.loss: answers")
    if conversation.is_plain:
        return conversation
    if conversation.rejected:
        chosen, rejected = (as_rendered(side, tokenizer, answers_only=True) for side in conversation.sides())
        return replace(chosen, rejected=rejected.turns)
    as_text = _with_text_arguments(conversation)
    missing = _missing(conversation, tokenizer)
    if missing is not None and as_text != conversation:
        conversation, missing = as_text, _missing(as_text, tokenizer)
    if missing is not None:
        raise Unusable(missing)
    return conversation


def reference(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The last answer, with which a model's is compared: its text, or all that is written of calls and reasoning.

    That is the written answer as answers are decoded: without the template's special tokens.
    """
    *before, answer = conversation.turns
    if len(answer) == 2:
        return str(answer["content"])
    start = len(render(before, tokenizer, tools=conversation.tools, generation_prompt=True))
    written = render(conversation.turns, tokenizer, tools=conversation.tools)[start:]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _missing(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The parts of a conversation that the chat template leaves out; None if it shows all.

    Every text is replaced by a mark of its own, so that an equal text elsewhere does not count.
    """
    marks = _Marks()
    marked = replace(
        conversation,
        turns=tuple(marks.turn(index, turn) for index, turn in enumerate(conversation.turns)),
        tools=tuple(map(marks.tool, conversation.tools)),
    )
    try:
        render(conversation.turns, tokenizer, tools=conversation.tools)
        text = render(marked.turns, tokenizer, tools=marked.tools)
        lost = {meaning for mark, meaning in marks.meanings.items() if mark not in text}
        for mark, index in marks.thoughts.items():
            # Many templates drop the thoughts of earlier answers, which then carry no loss; each must show the last's.
            if mark not in text and mark not in render(marked.turns[: index + 1], tokenizer, tools=marked.tools):
                lost.add("reasoning")
    except CannotWrite as error:
        return error.reason
    if lost:
        return f"{TEMPLATE} leaves out {', '.join(sorted(lost))}"
    if any(repr(arguments) in text for arguments in marks.arguments):
        return f"{TEMPLATE} writes the arguments of calls as Python and not as JSON"
    return None


class _Marks:
    """Copies of turns and tools in which every text is a mark."""

    def __init__(self) -> None:
        self.meanings: dict[str, str] = {}
        """Marks, with what each stands for."""
        self.thoughts: dict[str, int] = {}
        """Marks of reasoning, with the index of its turn."""
        self.arguments: list[object] = []
        """The marked arguments of each call."""

    def turn(self, index: int, turn: Turn) -> Turn:
        marked = dict(turn)
        whose = {"tool": "the results of tools", "user": "the user's text", "assistant": "the assistant's text"}
        if turn["content"]:
            marked["content"] = self._mark(whose[turn["role"]])
        for key in REASONING:
            if key in turn:
                marked[key] = f"thought{index:04d}end"
                self.thoughts[marked[key]] = index
        if "tool_calls" in turn:
            marked["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        return marked

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(tool["function"]) if isinstance(tool.get("function"), Mapping) else {}
        return {**tool, "function": {**function, "name": self._mark("tools")}}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        as_text = isinstance(arguments, str)
        marked = {
            key: self._mark("the arguments of calls") for key in (json.loads(arguments) if as_text else arguments)
        }
        if not as_text:
            self.arguments += [marked] if marked else []
        function = {"name": self._mark("tool calls"), "arguments": json.dumps(marked) if as_text else marked}
        return {**call, "function": function}

    def _mark(self, meaning: str) -> str:
        mark = f"mark{len(self.meanings):04d}end"
        self.meanings[mark] = meaning
        return mark


def _with_text_arguments(conversation: Conversation) -> Conversation:
    """The same with the arguments of calls as JSON text, which some templates take."""
    turns = []
    for turn in conversation.turns:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
            for call in turn.get("tool_calls", ())
            for arguments in (call["function"]["arguments"],)
        ]
        turns.append({**turn, "tool_calls": calls} if calls else turn)
    return replace(conversation, turns=tuple(turns))
