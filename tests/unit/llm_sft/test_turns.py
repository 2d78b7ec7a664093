"""Answers are found in the text that a chat template writes; what cannot be trained on says why."""

import datetime

import pytest
import templates
import tiny
from templates import turns

from ray_peft.tasks.llm_sft.turns import (
    LEFT_OUT,
    LONG,
    OTHERWISE,
    CannotWrite,
    Template,
    answers,
    end_of_answer_tokens,
    frame,
    missing_turn,
    prints_the_date,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def written(tokenizer):
    """A function that gives the tokenizer a chat template."""

    def with_template(text):
        tokenizer.chat_template = text
        return Template(tokenizer)

    return with_template


def located(template, *contents):
    given = turns(*contents)
    text = template.write(given)
    return [(text[each.begin : each.end], each.problem) for each in answers(text, given, template)]


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama2", " <|im_end|>"), ("gemma", "</turn>"), ("vicuna", "<|im_end|>")],
)
def test_answers_reach_from_the_generation_prompt_to_their_end_mark(written, name, end):
    found = located(written(templates.WHOLE[name]), "One?", "Yes \u00fc.", "Two?", "No.")
    assert [text.strip() for text, _ in found] == [f"Yes \u00fc.{end}", f"No.{end}"]
    assert {problem for _, problem in found} == {None}


@pytest.mark.parametrize("name", templates.WHOLE)
def test_answers_of_long_conversations_are_those_that_every_prefix_gives(written, name, monkeypatch):
    contents = [f"turn {i} \u00fc" + " x" * (i % 5) for i in range(LONG + 25)]
    template = written(templates.WHOLE[name])
    quick = located(template, *contents)
    monkeypatch.setattr("ray_peft.tasks.llm_sft.turns.LONG", 10**9)
    assert located(template, *contents) == quick
    assert len(quick) == len(contents) // 2


@pytest.mark.parametrize(
    "text",
    [
        templates.LAST_THINKS,
        # the third answer has another end, which repetition alone would not show
        templates.CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>' if loop.index != 6 else '<|pad|>') + '\\n'"),
        "{{ messages | length }}" + templates.CHATML,
        templates.CHATML.replace("{% for", "{% if messages | length > 20 %}Long. {% endif %}{% for"),
        templates.CHATML.replace("m['content']", "m['content'] | replace('turn 7', 'seven')"),
    ],
)
def test_templates_that_treat_turns_in_different_ways_give_the_same_however_long(written, text, monkeypatch):
    contents = [f"turn {i}" for i in range(LONG + 14)]
    template = written(text)
    quick = located(template, *contents)
    monkeypatch.setattr("ray_peft.tasks.llm_sft.turns.LONG", 10**9)
    assert located(template, *contents) == quick


def test_the_template_runs_a_few_times_for_a_conversation_of_any_length(written, monkeypatch):
    sizes = []
    write = Template.write
    monkeypatch.setattr(
        Template, "write", lambda self, given, **how: (sizes.append(len(given)), write(self, given, **how))[1]
    )
    work = []
    for count in (200, 400):
        sizes.clear()
        located(written(templates.CHATML), *(f"turn {i}" for i in range(count)))
        work.append(sum(sizes))
    assert work[1] < 2.5 * work[0]  # messages written: linear in the turns, where every prefix would be quadratic
    assert work[0] < 12 * 200


def test_an_answer_that_the_template_rewrites_later_is_unsound_and_the_last_one_is_not(written):
    found = located(written(templates.LAST_THINKS), "One?", "Yes.", "Two?", "No.")
    assert found[0][1] == OTHERWISE
    assert found[1] == ("<think>\n\n</think>\n\nNo.<|im_end|>", None)


def test_thoughts_that_the_template_leaves_out_make_the_answer_unsound(written):
    ((_, problem),) = located(written(templates.DROPS_THOUGHTS), "One?", "<think>Hm.</think>Yes.")
    assert problem == LEFT_OUT
    assert located(written(templates.DROPS_THOUGHTS), "One?", "Yes.") == [("Yes.<|im_end|>", None)]


def test_a_generation_prompt_that_answers_do_not_begin_with_is_named(written):
    ((_, problem),) = located(written(templates.ASKS_FOR_THOUGHTS), "One?", "Yes.")
    assert problem.endswith(r"to begin with: '<think>\n'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + nobody }}", "'nobody' is undefined"),
        ("{{ messages[0]['content'][0]['text'] + '!' }}", "has no attribute 'text'"),
        ("{{ messages[9]['content'].strip() }}", "has no element 9"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_whatever_a_template_raises_is_one_reason(written, text, words):
    with pytest.raises(CannotWrite, match=f"the chat template refuses it: .*{words}.*data.chat_template"):
        written(text).write(turns("One?", "Yes."))


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("Today {{ strftime_now('%d %b %Y %H:%M:%S') }}", "Today 26 Jul 2024 00:00:00"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %A') }}{% endif %}", "2024-07-26, Friday"),
        ("{{ strftime_now('%-d.%-m. %F %e') }}", "26.7. 2024-07-26 26"),
        ("{% macro head() %}{{ '(' + strftime_now('%d') + ')' }}{% endmacro %}{{ head() }}", "(26)"),
        ("{{ 'Today ' + date_string }}", "Today 26 Jul 2024"),
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}",
         "26 Jul 2024"),
    ],
)  # fmt: skip
def test_a_template_that_prints_a_date_gets_a_fixed_one(written, text, day):
    template = written(text + templates.CHATML)
    given = turns("One?", "Yes.")
    assert template.write(given) == day + Template(template.tokenizer).write(given)[len(day) :]
    assert template.write(given).startswith(f"{day}<|im_start|>user\n")
    assert prints_the_date(given, template)
    assert Template(template.tokenizer, datetime.date(2031, 1, 5)).write(given) != template.write(given)


def test_a_dated_template_keeps_its_white_space(written):
    text = "\n  {% for m in messages %}\n    {{ m['content'] }}\n  {% endfor %}\n"
    plain = written(text).write(turns("One?", "Yes."))
    assert written(text + "{% if False %}{{ strftime_now('%d') }}{% endif %}").write(turns("One?", "Yes.")) == plain
    assert plain.startswith("\n")


def test_a_template_that_asks_for_no_date_is_written_as_transformers_does(written, tokenizer):
    template = written(templates.CHATML)
    given = list(turns("One?", "Yes."))
    assert template.write(given) == tokenizer.apply_chat_template(given, tokenize=False)
    assert not prints_the_date(given, template)
    asked = tokenizer.apply_chat_template(given[:1], tokenize=False, add_generation_prompt=True)
    assert template.write(given[:1], ask=True) == asked


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (templates.CHATML, "<|im_end|>"),
        (templates.CHATML.replace("<|im_end|>", "<|pad|>"), "<|pad|>"),  # not the tokenizer's eos
        (templates.LLAMA2, "<|im_end|>"),
        (templates.GEMMA, "</turn>"),
        (templates.WITHOUT_END, ""),
        ("{{ raise_exception('never') }}", ""),
    ],
)
def test_the_tokens_that_end_an_answer_are_those_of_the_training_rows(written, tokenizer, text, end):
    written(text)
    tokens = end_of_answer_tokens(tokenizer)
    assert tokenizer.decode(tokens) == end
    assert tokens == tuple(tokenizer(end, add_special_tokens=False)["input_ids"])


def test_what_the_template_writes_before_an_answer_is_told_apart(written):
    assert frame(written(templates.LAST_THINKS)).lead == "<think>\n\n</think>"
    assert frame(written(templates.CHATML)).lead == ""
    without_prompt = templates.CHATML.partition("{% if")[0]
    assert frame(written(without_prompt)).lead == "<|im_start|>assistant"


def test_a_turn_that_the_template_leaves_out_is_named():
    given = [{"role": "system", "content": "Be  kind."}, {"role": "user", "content": "One?"}]
    assert missing_turn(given, "Be kind.\nOne?") is None
    assert missing_turn(given, "One?") == "system"
    assert missing_turn(given, "Be kind.") == "user"
