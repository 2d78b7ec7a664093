"""A tokenizer that cannot be used is refused before a row is read, with the way out."""

import json
import shutil
from pathlib import Path

import pytest
import templates
import tiny

from ray_peft.errors import DataError, ModelError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer


@pytest.fixture
def spec(tmp_path):
    """A function that gives a spec on a tokenizer of its own, with other settings in its tokenizer_config.json."""

    def with_settings(template=None, recipe="prompt_completion", **settings):
        folder = tmp_path / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)
        tiny.build_tokenizer(folder)
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config |= {"chat_template": templates.CHATML, **settings}
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        plain = tiny.plain_spec(folder, "rows.jsonl")
        plain["data"]["sources"][0]["recipe"] = recipe
        if recipe == "text":
            plain["train"]["loss"], plain["evaluation"]["generate"] = "all", False
        if template is not None:
            (tmp_path / "mine.jinja").write_bytes(template)
            plain["data"]["chat_template"] = str(tmp_path / "mine.jinja")
        return TrialSpec.from_plain(plain)

    return with_settings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_template_file_is_read_in_the_encodings_that_editors_save(spec, encoding):
    text = templates.CHATML.replace("{% for", "\r\n{% for")
    loaded = load_tokenizer(spec(text.encode(encoding)))
    assert loaded.chat_template == templates.CHATML.replace("{% for", "\n{% for")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (templates.CHATML.encode("utf-16-le"), "NUL characters.*save it as UTF-8"),
        ("{# \u00fc #}".encode("latin-1") + templates.CHATML.encode(), "is not UTF-8 text.*at byte 3"),
        (b" \n", "the file is empty"),
        (b"{{ messages[0]['content'] ", "is not valid Jinja: line 1"),
        (b"{% for m in messages %}\n{{ m }}\n{% endif %}", "is not valid Jinja: line 3.*endif"),
        (b"{{ messages | nofilter }}", "is not valid Jinja: line 1: No filter named 'nofilter'"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_its_name(spec, content, words):
    with pytest.raises(DataError, match=f"data.chat_template: .*mine.jinja: .*{words}"):
        load_tokenizer(spec(content))


def test_a_template_of_the_model_that_is_no_template_is_refused_with_the_way_out(spec):
    with pytest.raises(ModelError, match=r"not valid Jinja: line 1: .*in data\.chat_template"):
        load_tokenizer(spec(chat_template="{{ messages[0]['content'] "))


def test_the_default_of_several_templates_is_used_and_without_one_their_names_are_said(spec):
    named = [{"name": "default", "template": templates.CHATML}, {"name": "tool_use", "template": templates.VICUNA}]
    loaded = load_tokenizer(spec(chat_template=named))
    given = [{"role": "user", "content": "One?"}]
    assert loaded.apply_chat_template(given, tokenize=False).startswith("<|im_start|>user")
    named[0]["name"] = "chat"
    with pytest.raises(ModelError, match=r"chat templates chat, tool_use, .*data\.chat_template"):
        load_tokenizer(spec(chat_template=named))
    assert load_tokenizer(spec(templates.VICUNA.encode(), chat_template=named)).chat_template == templates.VICUNA


def test_a_template_that_needs_other_turns_is_left_to_the_rows(spec):
    needs_two = "{{ messages[1]['content'] }}" + templates.CHATML
    assert load_tokenizer(spec(chat_template=needs_two)).chat_template == needs_two


def test_a_tokenizer_without_tokens_to_pad_with_is_refused(spec):
    with pytest.raises(ModelError, match=r"neither a pad_token nor an eos_token.*model\.tokenizer"):
        load_tokenizer(spec(pad_token=None, eos_token=None))
    padded = load_tokenizer(spec(pad_token=None))
    assert padded.pad_token_id == padded.eos_token_id


def test_plain_text_needs_a_token_that_ends_it(spec):
    with pytest.raises(ModelError, match="no eos_token, which ends the rows of recipe text"):
        load_tokenizer(spec(recipe="text", eos_token=None))
    assert load_tokenizer(spec(eos_token=None)).eos_token_id is None
    assert load_tokenizer(spec(recipe="text", chat_template="{{ broken")).eos_token_id is not None


def test_a_path_that_is_no_template_file_is_said(spec, tmp_path):
    trial = spec()
    for path, words in (
        (tmp_path, "is a folder; name a .jinja file"),
        ("{{ messages }}", "must be the path of a file"),
    ):
        with pytest.raises(DataError, match=f"data.chat_template: .*{words}") as caught:
            load_tokenizer(trial.changed({"data.chat_template": str(path)}))
        assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_said_with_the_way_out(spec):
    trial = spec()
    (Path(trial.model.name) / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="it holds no tokenizer.json.*name the tokenizer in model.tokenizer"):
        load_tokenizer(trial)
