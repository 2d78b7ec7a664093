"""Turns of a conversation as data sets write them: ShareGPT, parts, tool calls, weights and reasoning."""

import pytest

from ray_peft.tasks.llm_sft.chat import messages
from ray_peft.tasks.llm_sft.conversation import Conversation, Unusable, WrongShape


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def result(text, **more):
    return {"role": "tool", "content": text, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("field", ["conversations", "conversation", "messages"])
def test_sharegpt_s_turns_and_system_column_are_read(field):
    row = {
        field: [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": "Hello"}],
        "system": "Be brief.",
        "messages" if field != "messages" else "conversations": None,
    }
    assert messages(row).turns == (user("Be brief.\n\nHi"), answer("Hello"))


def test_a_system_turn_that_repeats_the_system_column_stands_once():
    row = {"messages": [{"role": "system", "content": "S"}, user("Q"), answer("A")], "system": "S"}
    assert messages(row).turns == (user("S\n\nQ"), answer("A"))


def test_the_developer_instructs_as_the_system_does():
    row = {"messages": [{"role": "developer", "content": "S"}, user("Q"), answer("A")]}
    assert messages(row).turns == (user("S\n\nQ"), answer("A"))


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert messages({"messages": [user(parts), answer([{"type": "text", "text": "A"}])]}).turns == (
        user("one two"),
        answer("A"),
    )


@pytest.mark.parametrize(
    ("call", "called"),
    [
        ({"tool_calls": [CALL]}, CALLED),
        ({"tool_calls": [CALLED]}, CALLED),
        ({"tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'}, {**CALLED, "id": None}),
        ({"function_call": {"name": "add", "arguments": '{"a": 1}'}}, {**CALLED, "id": None}),
    ],
)
def test_calls_are_kept_with_their_arguments_as_objects(call, called):
    called = {key: value for key, value in called.items() if value is not None}
    row = {"messages": [user("Q"), answer(None, **call), result("2", tool_call_id="c1", name="add"), answer("A")]}
    row["tools"] = [TOOL]
    conversation = messages(row)
    assert conversation.turns == (
        user("Q"),
        {**answer(""), "tool_calls": [called]},
        result("2", tool_call_id="c1", name="add"),
        answer("A"),
    )
    assert conversation.tools == (TOOL,)
    assert not conversation.is_plain


def test_sharegpt_s_calls_observations_and_tools_as_text_are_read():
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "A"},
        ],
        "tools": '[{"name": "add", "parameters": {"type": "object", "description": null}}]',
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = messages(row)
    assert conversation.turns == (user("Q"), {**answer(""), "tool_calls": [call]}, result(""), answer("A"))
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none_however_they_are_written(tools):
    row = {"messages": [user("Q", tool_calls=None), answer("A", tool_calls=[])], "tools": tools}
    assert messages(row) == Conversation((user("Q"), answer("A")))


@pytest.mark.parametrize(
    "weight", [{"weight": 0}, {"weight": 0.0}, {"weight": False}, {"train": False}, {"loss": False}]
)
def test_answers_of_weight_0_stay_and_are_not_trained(weight):
    row = {"messages": [user("Q"), answer("A", **weight), user("P"), answer("B", weight=1)]}
    conversation = messages(row)
    assert conversation.turns == (user("Q"), answer("A"), user("P"), answer("B"))
    assert conversation.untrained == {1}


def test_turns_behind_the_last_trained_answer_go():
    row = {"messages": [user("Q"), answer("A"), user("P"), answer("B", weight=0)]}
    assert messages(row) == Conversation((user("Q"), answer("A")))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_its_own_name(key):
    row = {"messages": [user("Q"), answer("A", **{key: " hm "})]}
    assert messages(row).turns[1] == {**answer("A"), key: "hm"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([user([{"type": "image_url", "image_url": "x"}]), answer("A")], "a part of type image_url"),
        ([user("Q", images=["x"]), answer("A")], "images, audio or video"),
        ([user("Q"), answer("A", weight=0)], "every answer has weight 0"),
        ([user("Q"), answer("A", weight=0.5)], "a weight other than 0 and 1"),
        ([user("Q"), answer("A", weight="0")], "a weight other than 0 and 1"),
        ([user("Q"), result("1"), answer("A")], "a tool's result that follows the user"),
        ([user("Q"), answer("A"), result("1")], "does not end with the assistant"),
        ([result("1"), answer("A")], "does not start with the user"),
        ([user("Q"), answer("", tool_calls=[CALL]), answer("A")], "roles do not alternate"),
        ([user("Q"), answer("", tool_calls=[{"function": {}}])], "a tool call without name and arguments"),
        ([user("Q"), answer("", tool_calls="call me")], "a tool call without name and arguments"),
        ([user("Q"), answer("", tool_calls=[{"name": "f", "arguments": "{1"}])], "arguments are no JSON object"),
        ([user("Q", tool_calls=[CALL]), answer("A")], "tool calls in a turn that is not the assistant's"),
        ([user("Q"), answer("A", reasoning_content=["hm"])], "reasoning that is no text"),
        (
            [user("Q"), answer("", tool_calls=[CALL]), result("1"), {"role": "system", "content": "S"}, answer("A")],
            "system text between a tool's result and the answer",
        ),
    ],
)
def test_what_cannot_be_trained_in_full_is_unusable(row, reason):
    with pytest.raises(Unusable, match=reason):
        messages({"messages": row})


def test_images_beside_the_turns_make_a_row_unusable():
    with pytest.raises(Unusable, match="images"):
        messages({"messages": [user("Q"), answer("A")], "images": ["a.png"]})


@pytest.mark.parametrize(
    ("row", "words", "reason"),
    [
        ({"messages": [user("Q"), answer(3)]}, "field 'content' must be text .found int; the row", "found int)"),
        ({"messages": [user("Q"), {"role": "assistant"}]}, "field 'content' must be text .found nothing", "nothing)"),
        ({"messages": [user("Q"), {"role": "critic", "content": "A"}]}, r"messages\[1\].role is 'critic'; known", None),
        ({"conversations": [{"from": "bot", "value": "A"}]}, r"conversations\[0\].from is 'bot'", None),
        ({"messages": [user("Q")], "system": 3}, "field 'system' must be text", None),
    ],
)
def test_another_shape_names_the_field_and_a_reason_without_places(row, words, reason):
    with pytest.raises(WrongShape, match=words) as told:
        messages(row)
    assert reason is None or told.value.reason.endswith(reason)
    assert "[" not in told.value.reason


@pytest.mark.parametrize("bad", ["\ud83d", "\x00"])
@pytest.mark.parametrize(
    "row",
    [
        [user("Q{}"), answer("A")],
        [user("Q"), answer("A{}")],
        [user("Q"), answer("A", reasoning="{}")],
        [user("Q"), answer("", tool_calls=[{"name": "f{}", "arguments": {}}])],
        [user("Q"), answer("", tool_calls=[{"name": "f", "arguments": {"a": ["{}"]}}])],
        [user("Q"), answer("", tool_calls=[{"name": "f", "arguments": {"{}": 1}}])],
    ],
)
def test_characters_that_no_file_holds_are_seen_wherever_they_stand(row, bad):
    def put(value):
        if isinstance(value, dict):
            return {put(key): put(inner) for key, inner in value.items()}
        return [put(inner) for inner in value] if isinstance(value, list) else (
            value.replace("{}", bad) if isinstance(value, str) else value
        )  # fmt: skip

    messages({"messages": row}).check_characters()
    with pytest.raises(Unusable, match="surrogate" if bad != "\x00" else "NUL"):
        messages({"messages": put(row)}).check_characters()


def test_whole_surrogate_pairs_and_odd_but_sound_characters_are_text():
    Conversation(text="\U0001f469\u200d\U0001f467 \u202e \ufeff \u2028 \x1b[31m \x07").check_characters()
