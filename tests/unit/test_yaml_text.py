"""YAML says what its writer meant, or one line says where it does not."""

import math

import pytest

from ray_peft.errors import SearchSpaceError
from ray_peft.space.yaml_text import parse, read


def refused(text):
    with pytest.raises(SearchSpaceError) as caught:
        parse(text, "f.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("2E-4", 2e-4), ("3.e-4", 3e-4), (".5e-3", 5e-4), ("+6e-4", 6e-4), ("-1e5", -1e5),
        ("1_000", 1000),
        ("0", 0), ("-0", 0), ("0x10", 16), ("0.10", 0.1), ("00", 0),
        ("2024-01-01", "2024-01-01"), ("2024-01-01T10:00:00Z", "2024-01-01T10:00:00Z"), ("0o10", "0o10"),
        ("'010'", "010"),
        ("{<<: {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("{b: 3, <<: [{a: 1, b: 2}, {a: 9, c: 4}]}", {"a": 1, "b": 3, "c": 4}),
    ],
)  # fmt: skip
def test_values_are_what_most_people_read(text, value):
    assert parse(f"key: {text}", "f.yaml") == {"key": value}
    assert isinstance(parse(f"key: {text}", "f.yaml")["key"], type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 010", "f.yaml: line 1, column 7: 010 means 8 in YAML, which reads it as octal; write 8 or 10"),
        ("rank: -0_17", "-0_17 means -15"),
        ("steps: 1:30", "1:30 means 90 in YAML, which reads it in base 60; write 90"),
        ("steps: 1:30.5", "1:30.5 means 90.5"),
        ("rank: 100000000000000000000", "is larger than any setting can be"),
        ("a: {b: [1.0, .inf]}", "f.yaml: a.b.1: must be a finite number (found inf)"),
        ("a: -.INF", "must be a finite number (found -inf)"),
        ("a: .nan", "must be a finite number (found nan)"),
        ("a: 1e999", "must be a finite number (found inf)"),
        ("a: !!binary aGk=", "line 1, column 4: !!binary is no value that a setting takes"),
        ("a: !!set {b}", "!!set is no value"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: {1: 2}", "key 1 is not text; write it in quotes"),
        ("a: {yes: 2}", "key True is not text; write it in quotes"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document begins (---)"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("a: 1\nb: \x00", "line 2: character U+0000 is not allowed in YAML"),
        ("&a [*a]", "contains itself"),
        ("[" * 3000, "is nested too deeply"),
    ],
)
def test_what_would_surprise_is_one_line(text, words):
    assert words in refused(text)


def test_two_numbers_that_are_not_finite_are_two_lines():
    with pytest.raises(SearchSpaceError) as caught:
        parse("{a: .inf, b: .nan}", "f.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_is_read_in_the_encodings_of_yaml(tmp_path, encoding):
    path = tmp_path / "f.yaml"
    text = "\ufeffa: \u4e2d" if encoding == "utf-16-le" else "a: \u4e2d"
    path.write_bytes(text.encode(encoding))
    assert parse(read(path), "f.yaml") == {"a": "\u4e2d"}


def test_another_encoding_is_one_line_that_names_the_place(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"a: 1\nb: caf\xe9 \n")
    with pytest.raises(SearchSpaceError, match="line 2: is not UTF-8 text .*save it as UTF-8"):
        read(path)
    with pytest.raises(SearchSpaceError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_numbers_stay_numbers():
    value = parse("lr: 1e-4", "f.yaml")["lr"]
    assert math.isclose(value, 1e-4)
    assert isinstance(value, float)


def test_aliases_that_make_a_thousand_million_values_are_refused_at_once():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    with pytest.raises(SearchSpaceError, match=r"^f.yaml: aliases \(\*name\) repeat its values to more than 1,000,000"):
        parse("\n".join(lines), "f.yaml")
    assert parse("a: &a [1, 2]\nb: [*a, *a]", "f.yaml") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
