"""Files of rows are read as people have them, or refused in one error with the place and the way out."""

import gzip
import json
import os

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.tasks.llm_sft.files import local_files, read


def _packed(content):
    """The same bytes at any time: they are in the names of tests, which all workers must agree on."""
    return gzip.compress(content, mtime=0)


ROWS = [{"prompt": f"q\u00fc\u2028{i}", "completion": "a \U0001f600"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\n' for row in ROWS)


def values(path):
    return [row.values for row in read(str(path), "train")]


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", LINES.encode()),
        ("ascii.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode()),
        ("mark.jsonl", LINES.encode("utf-8-sig")),
        ("two_marks.jsonl", b"\xef\xbb\xbf" + b"\xef\xbb\xbf".join(LINES.encode().splitlines(keepends=True))),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("old_mac.jsonl", LINES.replace("\n", "\r").encode()),
        ("blank_lines.jsonl", ("\n\n" + LINES.replace("\n", "\n \n")).encode()),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("utf16_windows.jsonl", LINES.replace("\n", "\r\n").encode("utf-16")),
        ("utf16_no_mark.jsonl", LINES.encode("utf-16-le")),
        ("utf32.jsonl", LINES.encode("utf-32")),
        ("lines.json", LINES.encode()),
        ("list.json", json.dumps(ROWS, ensure_ascii=False).encode()),
        ("list_mark.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("list_utf16.json", json.dumps(ROWS).encode("utf-16")),
        ("list.jsonl", json.dumps(ROWS).encode()),
        ("pretty.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("pretty_windows.json", json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode("utf-8-sig")),
        ("list_a_row_a_line.jsonl", ("[" + ",\n".join(map(json.dumps, ROWS)) + "]").encode()),
        ("objects_over_lines.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()),
        ("wrapped.json", json.dumps({"version": "1.0", "data": ROWS}).encode()),
        ("wrapped_pretty.json", json.dumps({"note": [1], "rows": ROWS, "empty": []}, indent=1).encode()),
        ("wrapped.jsonl", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("UPPER.JSONL", LINES.encode()),
        ("UPPER.JSONL.GZ", _packed(LINES.encode())),
        ("two_members.jsonl.gz", _packed(LINES[:40].encode()) + _packed(LINES[40:].encode())),
        ("list.json.gz", _packed(json.dumps(ROWS).encode("utf-8-sig"))),
        ("table.csv", TABLE.encode()),
        ("excel.csv", TABLE.replace("\n", "\r\n").encode("utf-8-sig")),
        ("semicolons.csv", TABLE.replace(",", ";").encode()),
        ("excel_unicode.csv", TABLE.replace(",", "\t").encode("utf-16")),
        ("blank_above.csv", ("\n \n" + TABLE).encode()),
        ("table.tsv", TABLE.replace(",", "\t").encode()),
        ("TABLE.CSV.GZ", _packed(TABLE.encode())),
    ],
)  # fmt: skip
def test_every_way_to_write_rows_reads_the_same(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert values(tmp_path / name) == ROWS


def test_parquet_reads_the_same_in_any_case_of_its_ending(tmp_path):
    assert values(parquet(tmp_path / "ROWS.Parquet", ROWS)) == ROWS


def test_fields_of_a_table_are_text_as_it_stands(tmp_path):
    (tmp_path / "t.csv").write_text('prompt,completion\n"a, ""b""\nc",007\nNA,1.50\n\n,null\n', encoding="utf-8")
    assert values(tmp_path / "t.csv") == [
        {"prompt": 'a, "b"\nc', "completion": "007"},
        {"prompt": "NA", "completion": "1.50"},
        {"prompt": "", "completion": "null"},
    ]


def test_fields_longer_than_the_csv_module_s_limit_are_read(tmp_path):
    (tmp_path / "t.csv").write_text(f"prompt,completion\nq,{'a' * 200_000}\n", encoding="utf-8")
    (row,) = values(tmp_path / "t.csv")
    assert len(row["completion"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "a.jsonl: the file holds no rows"),
        ("a.jsonl", b" \n\r\n", "holds no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"prompt,completion\n", "holds no rows"),
        ("a.jsonl.gz", b"", "holds no rows"),
        ("a.jsonl.gz", _packed(b""), "holds no rows"),
        ("a.json", b'{"a": 1}', "must be a JSON list of objects.*no list of objects, but 'a'.*orient='records'"),
        ("a.json", b'{"train": [{}], "test": [{}]}', "found an object with lists 'train', 'test'.*a file of their own"),
        ("a.json", b'{"prompt": {"0": "q"}, "completion": {"0": "a"}}', "no list of objects, but 'prompt', 'com"),
        ("a.json", b'{"data": [{}], "data": [{}]}', "key 'data' stands twice in the object around the rows"),
        ("a.json", b"3", "must be a JSON list of objects"),
        ("a.json", b'[{"a": 1},\n', "line 2: not valid JSON"),
        ("a.json", b'[\n{"a": 1}\n{"a": 2}\n]', "line 3: not valid JSON: Expecting ',' delimiter at column 1"),
        ("a.json", b'[\n{"a": 1},\n{"a": "caf\xe9"}]', "line 3: byte 0xe9 at column 11 is not UTF-8.*iconv"),
        ("a.json", b"[" * 100_000, "line 1: its lists and objects are nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "holds a number of too many digits"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16")[:-1], "is not utf-16-le text, as its first bytes say, or it is cut"),
        ("a.csv", b"prompt,prompt\nq,a\n", "line 1: the header names column 'prompt' twice"),
        ("a.csv", b"prompt,\nq,a\n", "line 1: the header has a column without a name"),
        ("a.csv", b"pr\xe9,b\nq,a\n", "line 1: byte 0xe9 at column 3 is not UTF-8"),
        ("a.csv", b'prompt,completion\nq,a\n"open,a\nq,a\n', "line 3: not valid CSV"),
        ("a.txt", b"x", "unknown kind of file; known are .jsonl, .json, .parquet, .csv, .tsv"),
        ("a.parquet.gz", b"x", "unknown kind of file"),
        ("a.jsonl.gz", b'{"a": 1}\n', "not packed by gzip, though its name ends in .gz; take .gz from its name"),
        ("a.jsonl", _packed(b'{"a": 1}'), "it is packed by gzip; add .gz to its name"),
        ("a.jsonl", b"PAR1....", "it is a Parquet file; let its name end in .parquet"),
        ("a.csv", b"PK\x03\x04....", "a zip archive or a spreadsheet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        ("a.json", b"\n <!DOCTYPE html><html>", "a web page, not the file itself"),
        ("a.parquet", b"", "cut, damaged, or no Parquet file"),
        ("a.parquet", b"no parquet", "cut, damaged, or no Parquet file"),
        ("a.JSONL.ZST", b"x", ".zst files are not read; unpack it .`unzstd`."),
        ("a.jsonl.bz2", b"x", "bunzip2"),
        ("a.jsonl.xz", b"x", "unxz"),
        ("a.tar.gz", b"x", "tar xzf"),
        ("a.zip", b"x", "unzip"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_as_a_whole_is_one_error_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){name}: .*{words}" if name not in words else words) as told:
        values(tmp_path / name)
    assert str(told.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3", "not valid JSON: Expecting value at column 7"),
        ("a.jsonl", b'{"a": "b\n{"a": 1}\n', "line 1", "not valid JSON: Unterminated string"),
        ("a.jsonl", b'{"a": 1},\n{"a": 1}\n', "line 1", "not valid JSON: Extra data at column 9"),
        ("a.jsonl", b'{"a": 1}\n\0\0\0\0', "line 2", "not valid JSON"),
        ("a.jsonl", b"[1]\n[2]\n", "line 1", r"must be a JSON object \(found list\)"),
        ("a.jsonl", b"[1]\n", "row 1", r"must be a JSON object \(found int\)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "line 2", "byte 0xe9 at column 11 is not UTF-8.*iconv"),
        ("a.jsonl", b'{"a": 1}\r\n{"a": {"b": 1, "b": 1}}\r\n', "line 2", "key 'b' stands twice in one object"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', "row 2", "key 'a' stands twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000, "line 2", "nested too deeply"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3", "has 3 fields, but the header has 2"),
        ("a.csv", b'a,b\n"1\n1",2\n1\n', "line 4", "has 1 fields, but the header has 2"),
        ("a.csv", b"\na,b\n1\n", "line 3", "has 1 fields"),
        ("a.csv", b"a,b\n1,caf\xe9\n", "line 2", "byte 0xe9 at column 4 is not UTF-8"),
    ],
)
def test_a_row_that_cannot_be_read_is_told_with_its_line(tmp_path, name, content, place, words):
    (tmp_path / name).write_bytes(content)
    (bad, *_) = [row for row in read(str(tmp_path / name), "train") if row.values is None]
    assert bad.place == place
    with pytest.raises(AssertionError, match=words):  # pytest's own match, for its message
        raise AssertionError(bad.detail)


def test_a_bad_byte_far_into_a_file_is_told_with_its_own_line(tmp_path):
    lines = [json.dumps({"a": "x" * 90}).encode()] * 3000
    lines[2500] = lines[2500].replace(b"xxx", b"x\xe9x", 1)
    (tmp_path / "late.jsonl").write_bytes(b"\n".join(lines))
    bad = [(row.number, row.place) for row in read(str(tmp_path / "late.jsonl"), "train") if row.values is None]
    assert bad == [(2501, "line 2501")]


@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_file_is_no_shorter_file(tmp_path, packed):
    rows = [{"prompt": f"{i} {os.urandom(9).hex()}", "completion": "a"} for i in range(500)]
    path = tmp_path / ("cut.jsonl.gz" if packed else "cut.parquet")
    if packed:
        path.write_bytes(_packed("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        parquet(path, rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cut.*damaged.*download it again"):
        values(path)


def test_a_damaged_gzip_file_is_said(tmp_path):
    content = bytearray(_packed(LINES.encode()))
    content[-6] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match="cut or damaged"):
        values(tmp_path / "a.jsonl.gz")


def test_a_parquet_column_that_is_there_twice_is_said(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has column 'prompt' twice"):
        values(tmp_path / "a.parquet")


def folder_of(tmp_path, names):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(names):
        if name.endswith(".parquet"):
            parquet(folder / name, ROWS[number : number + 1])
        else:
            tiny.write_rows(folder / name, ROWS[number : number + 1])
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["part-1-of-2.JSONL", "part-2-of-2.JSONL"],
        ["part-00000-c0.json", "part-00001-c0.json"],
    ],
)
def test_a_folder_of_shards_is_read_by_name(tmp_path, names):
    folder = folder_of(tmp_path, names)
    for name in ("README.md", "_SUCCESS", ".part-00000-c0.json.crc", "dataset_infos.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    rows = list(read(str(folder), "train"))
    assert [row.values for row in rows] == ROWS[:2]
    assert [(row.file, row.number) for row in rows] == [(str(folder / name), 1) for name in names]
    (tmp_path / "link").symlink_to(folder)
    assert values(tmp_path / "link") == ROWS[:2]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "is a folder without files of rows"),
        (["a.jsonl", "b.parquet"], "several kinds: .jsonl .a.jsonl., .parquet .b.parquet."),
        (["a.jsonl", "a.jsonl.gz"], "several kinds"),
        (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], "shards of several splits .test, train."),
        (["train.jsonl", "validation.jsonl"], "several splits .train, validation.*test_path"),
        (["a-00000-of-00003.jsonl", "a-00002-of-00003.jsonl"], r"1 of the 3 shards a-\*-of-00003.jsonl are missing"),
        (["a.jsonl.bz2"], "bunzip2"),
        (["dataset_info.json", "state.json"], "saved by save_to_disk"),
    ],
)
def test_a_folder_that_is_not_one_set_of_shards_is_refused(tmp_path, names, words):
    folder = folder_of(tmp_path, names)
    with pytest.raises(DataError, match=words):
        values(folder)


def test_a_folder_of_folders_names_them(tmp_path):
    (tmp_path / "repository" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match="there are folders in it .data.: name one of them"):
        values(tmp_path / "repository")


def test_links_to_nothing_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="a.jsonl is a link to a file that is not there"):
        values(tmp_path / "data")
    with pytest.raises(DataError, match=r"a.jsonl: no such file \(a link to .*gone"):
        values(tmp_path / "data" / "a.jsonl")


@pytest.mark.parametrize("name", ["gone.jsonl", "GONE.JSONL.GZ", "gone.csv", "gone.zip", "./gone"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{name}: no such file"):
        values(name)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://example.org/rows", "this is an address: download"),
        ("data/*", "patterns are not read: name the folder"),
    ],
)
def test_an_address_and_a_pattern_are_no_hub_data_sets(path, words):
    with pytest.raises(DataError, match=f"no such file; {words}"):
        values(path)


def test_a_device_is_not_read(tmp_path):
    with pytest.raises(DataError, match="/dev/zero: is neither a file nor a folder"):
        values("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        values(tmp_path / "pipe.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = tiny.write_rows(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        local_files(str(path))


def test_numbers_that_json_does_not_know_fail_only_where_text_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "score": NaN}\n' * 2, encoding="utf-8")
    assert [row["prompt"] for row in values(tmp_path / "a.jsonl")] == ["q", "q"]
