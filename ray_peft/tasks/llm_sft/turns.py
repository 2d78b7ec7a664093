"""Conversations as text: the input of the chat template, the text that it writes, and where the answers are in it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from ray_peft.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ray_peft.tasks.llm_sft.conversation import Conversation

Message = Mapping[str, Any]
"""What a chat template is given of a turn: role, content, and whatever else the row has for it."""

DATE = datetime.date(2024, 7, 26)
"""The day that templates print, unless `data.template_date` says another: the one that Llama 3's template names."""

LONG = 16
"""Messages of a conversation from which on its answers are looked for by what repeats, in linear time."""

_OPEN, _CLOSE = "\U0010fffc", "\U0010fffd"
"""Private characters around the content of a message, to see where the template puts it."""

_CODES = "aAbBcdfHIjmMpSUwWxXyYZz"
"""Of strftime, those of every platform."""
_SPELT_OUT = {"%F": "%Y-%m-%d", "%T": "%H:%M:%S", "%R": "%H:%M", "%D": "%m/%d/%y", "%h": "%b"}

REWRITTEN = "the chat template rewrites earlier turns, so that answers cannot be told apart"
OTHER_START = "the chat template writes answers without what its generation prompt asks them to begin with:"
OTHERWISE = "the chat template writes them in another way once other turns follow"
LEFT_OUT = "the chat template leaves out a part of the answer"
NO_QUESTION = "an answer without a question before it"


class CannotWrite(Exception):
    """The chat template or the tokenizer fails on a conversation, or refuses it; the text names the way out."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}; {way_out}")
        self.reason = reason
        """The same without the way out; skipped rows are counted under it."""


def messages(conversation: Conversation) -> list[Message]:
    """The messages of a conversation as a chat template takes them; nothing else turns turns into messages."""
    return [dict(turn) for turn in conversation.turns]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template on a fixed day: equal conversations are equal text, whenever they are written."""

    tokenizer: PreTrainedTokenizerBase
    date: datetime.date = DATE

    def write(self, turns: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), ask: bool = False) -> str:
        """The text of a conversation; `ask` adds the generation prompt, after which the model answers.

        Raises:
            CannotWrite: the template fails on it, or refuses it.
        """
        try:
            offered: list[Any] | None = [dict(tool) for tool in tools] or None
            template = self.tokenizer.get_chat_template(None, offered)
            variables: dict[str, Any] = (
                {"date_string": self.date.strftime("%d %b %Y")} if "date_string" in template else {}
            )
            text = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=offered,
                chat_template=_dated(template, self.date),
                tokenize=False,
                add_generation_prompt=ask,
                **variables,
            )
        except Exception as error:  # templates are programs: they raise what Jinja, Python and transformers raise
            reason = f"the chat template refuses it: {first_line(error)}"
            raise CannotWrite(reason, "mend the row, or name another template in data.chat_template") from None
        return str(text)


def _dated(template: str, date: datetime.date) -> str:
    """The template with a `strftime_now` of its own, which writes `date` at midnight.

    transformers gives templates one that asks the clock, and takes no other in its place.
    """
    if "strftime_now" not in template:
        return template
    codes = {**_SPELT_OUT, "%-d": str(date.day), "%e": f"{date.day:2d}", "%-m": str(date.month)}
    day = datetime.datetime(date.year, date.month, date.day)
    codes |= {f"%{code}": day.strftime(f"%{code}") for code in _CODES}
    filters = "".join(f" | replace({code!r}, {value!r})" for code, value in codes.items())
    # The line break after the macro is Jinja's to remove (trim_blocks), so that the template starts on a line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


@dataclass(frozen=True)
class Answer:
    """An assistant's turn in the text of a conversation."""

    turn: int
    begin: int
    """Its first character: what the model is asked for begins here. 0 if there is a problem, as `end`."""
    end: int
    """Behind its last character, the template's end mark included."""
    problem: str | None = None
    """Why it cannot be trained on as it stands; None if it can."""


def answers(
    text: str, turns: Sequence[Message], template: Template, tools: Sequence[Mapping[str, Any]] = ()
) -> list[Answer]:
    """Where each answer stands in `text`, which is what the template writes of `turns` and `tools`.

    An answer is sound if the text before it is the prompt that the model gets for it, and if the template writes the
    answer in the same way whatever turns follow. Then the model is trained on what it sees when it is used.

    Raises:
        CannotWrite: the template fails on the first turns of the conversation.
    """
    places = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    located = _by_repetition(text, turns, places, template) if len(turns) > LONG and not tools else None
    if located is None:
        located = [_by_prefix(text, turns, index, template, tools) for index in places]
    return [_checked_for_omission(answer, text, turns[answer.turn]) for answer in located]


def _by_prefix(
    text: str, turns: Sequence[Message], index: int, template: Template, tools: Sequence[Mapping[str, Any]] = ()
) -> Answer:
    """The answer at `index`, from what the template writes of the turns before it, and of those with it."""
    if not index:
        return Answer(index, 0, 0, NO_QUESTION)
    begin = template.write(turns[:index], tools=tools, ask=True)
    end = text if index + 1 == len(turns) else template.write(turns[: index + 1], tools=tools)
    if not end.startswith(begin):
        alike = end.startswith(template.write(turns[:index], tools=tools))
        return Answer(index, 0, 0, f"{OTHER_START} {_continuation(begin, end)!a}" if alike else REWRITTEN)
    if not text.startswith(end.rstrip()):
        return Answer(index, 0, 0, OTHERWISE if text.startswith(begin) else REWRITTEN)
    return Answer(index, len(begin), len(end.rstrip()))


def _continuation(prompt: str, text: str) -> str:
    """How a generation prompt goes on where a text does not."""
    return prompt[len(commonprefix([prompt, text])) :][:40]


def _by_repetition(text: str, turns: Sequence[Message], places: list[int], template: Template) -> list[Answer] | None:
    """The same in linear time: the text between turns is always the same, which prefixes of doubling length confirm.

    None if the template writes the turns in different ways. The last answer, which templates treat differently, is
    always located by itself.
    """
    contents = _contents(text, turns, template)
    if contents is None or not places or not places[0]:
        return None
    *earlier, last = places
    before = {text[contents[index - 1][1] : contents[index][0]] for index in earlier}
    after = {text[contents[index][1] : contents[index + 1][0]] for index in earlier}
    roles = {(turns[index - 1]["role"], turns[index + 1]["role"]) for index in earlier}
    if any(len(ways) > 1 for ways in (before, after, roles)):
        return None
    samples = {2**power - 1 for power in range(len(earlier).bit_length())} | {len(earlier) - 1}
    shapes = set()
    for sample in sorted(samples):
        answer = _by_prefix(text, turns, earlier[sample], template)
        start, stop = contents[answer.turn - 1][1], contents[answer.turn][1]
        sound = answer.problem is None
        shapes.add((answer.begin - start if sound else 0, answer.end - stop if sound else 0, answer.problem))
    if len(shapes) != 1:
        return None
    ((lead, tail, problem),) = shapes
    located = [
        Answer(i, 0, 0, problem) if problem else Answer(i, contents[i - 1][1] + lead, contents[i][1] + tail)
        for i in earlier
    ]
    return [*located, _by_prefix(text, turns, last, template)]


def _contents(text: str, turns: Sequence[Message], template: Template) -> list[tuple[int, int]] | None:
    """Where the template puts the content of each turn; None if it does not put each there once, as it is."""
    plain = all(set(turn) == {"role", "content"} and isinstance(turn["content"], str) for turn in turns)
    if not plain or _OPEN in text or _CLOSE in text:
        return None
    try:
        marked = template.write([{**turn, "content": f"{_OPEN}{turn['content']}{_CLOSE}"} for turn in turns])
    except CannotWrite:
        return None
    parts = marked.split(_OPEN)
    if len(parts) != len(turns) + 1 or any(part.count(_CLOSE) != 1 for part in parts[1:]):
        return None
    if marked.replace(_OPEN, "").replace(_CLOSE, "") != text:
        return None
    contents = []
    place = len(parts[0])
    for part in parts[1:]:
        contents.append((place, place + part.index(_CLOSE)))
        place += len(part) - 1
    return contents


def _checked_for_omission(answer: Answer, text: str, turn: Message) -> Answer:
    """The answer with its problem, if the template has left out a part of it, such as thoughts.

    White space does not count: templates trim it and add it.
    """
    content = turn.get("content")
    sought = "".join(content.split()) if isinstance(content, str) else ""
    if answer.problem is None and sought not in "".join(text[answer.begin : answer.end].split()):
        return Answer(answer.turn, 0, 0, LEFT_OUT)
    return answer


def missing_turn(turns: Sequence[Message], text: str) -> str | None:
    """The role of a question or instruction whose content the template has left out of `text`; None if all is there."""
    compact, place = "".join(text.split()), 0
    for turn in turns:
        content = turn.get("content")
        if turn["role"] in ("user", "system") and isinstance(content, str):
            sought = "".join(content.split())
            position = compact.find(sought, place)
            if position < 0 and sought not in compact:
                return str(turn["role"])
            place = max(place, position + len(sought))
    return None


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around an answer, and the model learns to write with it."""

    lead: str
    """Before the answer's own text, after the generation prompt: such as an empty block of thoughts."""
    end: str
    """After the answer's own text, without white space around it: the end mark. Empty if there is none."""
    end_tokens: tuple[int, ...]
    """The tokens of the end mark, as they are in the rows."""


def frame(template: Template) -> Frame | None:
    """What a template puts around an answer, seen in a conversation of one question; None if it cannot write that."""
    turns: list[Message] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]
    try:
        text = template.write(turns)
        (answer,) = answers(text, turns, template)
    except CannotWrite:
        return None
    start = text.find("Because", answer.begin)
    if answer.problem is not None or start < 0:
        return None
    stop = start + len("Because")
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    end = text[stop : answer.end]
    first = stop + len(end) - len(end.lstrip())
    tokens = tuple(token for token, (begin, until) in pairs if begin < answer.end and until > max(first, begin))
    return Frame(text[answer.begin : start].strip(), end.strip(), tokens if end.strip() else ())


def end_of_answer_tokens(tokenizer: PreTrainedTokenizerBase, date: datetime.date = DATE) -> tuple[int, ...]:
    """The tokens that end an answer in the training rows, in order: such as that of <|im_end|>.

    They are trained as part of every answer. Where the first one is a special token, it alone ends an answer; text
    such as "### End" may take several. Empty if the template ends answers with nothing, or cannot be written.
    """
    answer_frame = frame(Template(tokenizer, date)) if tokenizer.chat_template else None
    return answer_frame.end_tokens if answer_frame is not None else ()


def prints_the_date(turns: Sequence[Message], template: Template, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
    """True if the text of a conversation depends on the day."""
    later = Template(template.tokenizer, template.date + datetime.timedelta(days=400))
    return template.write(turns, tools=tools) != later.write(turns, tools=tools)
