"""What a chat template leaves out of a row makes the row unusable; what it shows is trained."""

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import data, describe
from ray_peft.tasks.llm_sft.chat import messages
from ray_peft.tasks.llm_sft.conversation import Unusable
from ray_peft.tasks.llm_sft.encode import encode
from ray_peft.tasks.llm_sft.rendering import as_rendered
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

CALLING = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content and LATER %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ARGUMENTS + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template with tools, calls and reasoning, in the manner of Qwen's."""

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": "ü"}'}}
U, A = ({"role": "user", "content": "add"}, {"role": "assistant", "content": "add"})
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "add"}


def template(arguments="(c.function.arguments | tojson)", later="true"):
    return CALLING.replace("ARGUMENTS", arguments).replace("LATER", later)


@pytest.fixture(scope="module")
def tokenizer(tiny_model, questions):
    return load_tokenizer(TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions)))


def written(tokenizer, chat_template, row):
    """The trained text of a row."""
    tokenizer.chat_template = chat_template
    conversation = as_rendered(messages(row), tokenizer, True)
    _, labels = encode(conversation, tokenizer)
    return tokenizer.decode([label for label in labels if label != data.IGNORED]), conversation


@pytest.mark.parametrize("arguments", ["(c.function.arguments | tojson)", "c.function.arguments"])
def test_calls_tools_and_results_are_trained_as_the_template_writes_them(tokenizer, arguments):
    row = {"messages": [U, CALLED, RESULT, A], "tools": [TOOL]}
    text, conversation = written(tokenizer, template(arguments), row)
    assert text == '<call>add{"a": "ü"}</call><|im_end|>add<|im_end|>'
    ids, _ = encode(conversation, tokenizer)
    assert '"parameters"' in tokenizer.decode(ids)
    assert "<|im_start|>tool\nadd" in tokenizer.decode(ids)


def test_arguments_are_never_trained_as_python_writes_them(tokenizer):
    text, _ = written(tokenizer, template("(c.function.arguments | string)"), {"messages": [U, CALLED]})
    assert text == '<call>add{"a": "ü"}</call><|im_end|>'


@pytest.mark.parametrize(
    ("row", "chat_template", "reason"),
    [
        # "add" stands in the text of every turn, so that finding the name proves nothing.
        ({"messages": [U, CALLED, RESULT, A]}, tiny.CHATML, "leaves out the arguments of calls, tool calls"),
        ({"messages": [U, {**A, "tool_calls": [CALL]}]}, tiny.CHATML, "leaves out the arguments of calls, tool calls"),
        ({"messages": [U, A], "tools": [TOOL]}, tiny.CHATML, "leaves out tools"),
        ({"messages": [U, {**A, "reasoning_content": "add"}]}, tiny.CHATML, "leaves out reasoning"),
        (
            {"messages": [U, {**A, "reasoning_content": "add"}, U, A]},
            tiny.CHATML,
            "leaves out reasoning",
        ),
        (
            {"messages": [U, A, RESULT, A]},
            tiny.CHATML.replace(" in messages %}", " in messages if message.role != 'tool' %}"),
            "leaves out the results of tools",
        ),
        (
            {"messages": [U, {**A, "tool_calls": [CALL]}]},
            template().replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            "leaves out the assistant's text",
        ),
        (
            {"messages": [U, A, RESULT, A]},
            "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}",
            "refuses it: no tools here",
        ),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_makes_the_row_unusable(tokenizer, row, chat_template, reason):
    with pytest.raises(Unusable, match=f"^the chat template {reason}$"):
        written(tokenizer, chat_template, row)


def test_reasoning_that_only_the_last_answer_shows_is_no_reason_to_leave_a_row_out(tokenizer):
    thinking = {**A, "reasoning_content": "hm"}
    tokenizer.chat_template = template(later="loop.last")
    as_rendered(messages({"messages": [U, thinking, U, thinking]}), tokenizer, True)


def test_a_plain_row_asks_nothing_of_the_template(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('asked') }}"
    conversation = messages({"messages": [U, A]})
    assert as_rendered(conversation, tokenizer, True) is conversation


def test_an_answer_of_weight_0_carries_no_loss(tokenizer):
    row = {"messages": [U, {"role": "assistant", "content": "bad", "weight": 0}, U, A]}
    text, conversation = written(tokenizer, tiny.CHATML, row)
    assert text == "add<|im_end|>"
    assert "bad" in tokenizer.decode(encode(conversation, tokenizer)[0])
    with pytest.raises(Unusable, match="weight: 0 needs train.loss: answers"):
        as_rendered(conversation, tokenizer, False)


def chat_spec(tiny_model, folder, rows, **changes):
    path = tiny.write_rows(folder / "rows.jsonl", rows)
    plain = tiny.plain_spec(tiny_model, path)
    plain["data"]["sources"][0] |= {"recipe": "messages", "train": 4, "test": 2}
    plain["data"] |= {"max_length": 400, **changes}
    return TrialSpec.from_plain(plain)


def test_the_reference_of_a_call_is_the_call_as_it_is_decoded(tiny_model, tmp_path):
    (tmp_path / "calling.jinja").write_text(template(), encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, CALLED], "tools": [TOOL]} for i in range(6)]
    spec = chat_spec(tiny_model, tmp_path, rows, chat_template=str(tmp_path / "calling.jinja"))
    prepared = data.prepare(spec, load_tokenizer(spec))
    assert set(prepared.test["reference"]) == {'<call>add{"a": "ü"}</call>'}
    written_files = describe.write(spec, tmp_path)
    assert '"tool_calls"' in written_files[0].read_text(encoding="utf-8")
    assert '"tools"' in written_files[0].read_text(encoding="utf-8")


def test_rows_that_the_template_cannot_show_are_counted_and_named(tiny_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, CALLED if i % 3 == 0 else A]} for i in range(9)]
    spec = chat_spec(tiny_model, tmp_path, rows)
    (counts,) = data.prepare(spec, load_tokenizer(spec)).counts
    reason = "the chat template leaves out the arguments of calls, tool calls"
    assert counts.unusable == {reason: 3}
    assert counts.unusable_rows == {reason: "rows 1, 4, 7"}
    report = describe.report(spec)
    assert report.unusable_rows == {"messages": {reason: "rows 1, 4, 7"}}


def test_too_few_rows_name_the_template_as_the_way_out(tiny_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, CALLED if i else A]} for i in range(9)]
    spec = chat_spec(tiny_model, tmp_path, rows)
    words = r"has 1 usable rows for test.*8 rows are unusable \(8 x the chat template leaves out.*data.chat_template"
    with pytest.raises(DataError, match=words):
        data.prepare(spec, load_tokenizer(spec))


def test_rows_that_were_skipped_are_an_error_again_when_unusable_is_fail(tiny_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, A]} for i in range(9)] + [{"messages": 3}]
    skipping = chat_spec(tiny_model, tmp_path, rows, unusable="skip")
    (counts,) = data.prepare(skipping, load_tokenizer(skipping)).counts
    assert counts.unusable_rows == {"field 'messages' must be a list (found int)": "row 10"}
    failing = chat_spec(tiny_model, tmp_path, rows)
    with pytest.raises(DataError, match="row 10 does not fit recipe messages: .*data.unusable: skip"):
        data.prepare(failing, load_tokenizer(failing))


def test_too_few_rows_within_the_limit_say_which_cannot_be_used(tiny_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Q{i} {'x' * 60 * (i % 2)}"}, A]} for i in range(12)]
    rows.append({"messages": []})
    spec = chat_spec(tiny_model, tmp_path, rows, max_length=64, too_long="drop")
    plain = spec.plain()
    plain["data"]["sources"][0]["train"] = 9
    spec = TrialSpec.from_plain(plain)
    with pytest.raises(DataError, match=r"within max_length.*1 rows are unusable \(1 x no turns: row 13\)"):
        data.prepare(spec, load_tokenizer(spec))


def test_changed_shards_are_another_key(tiny_model, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Q{i}"}, A]} for i in range(9)]
    tiny.write_rows(folder / "part-0.jsonl", rows)
    spec = chat_spec(tiny_model, tmp_path, rows)
    plain = spec.plain()
    plain["data"]["sources"][0]["path"] = str(folder)
    spec = TrialSpec.from_plain(plain)
    tokenizer = load_tokenizer(spec)
    first = data.prepare(spec, tokenizer)
    tiny.write_rows(folder / "part-1.jsonl", rows)
    second = data.prepare(spec, tokenizer)
    assert first.key != second.key
    assert (first.counts[0].read, second.counts[0].read) == (9, 18)
