"""Files with one JSON value a line, read while another process adds to them."""

import os

from ray_peft.foundation.json_lines import GrowingFile


def test_lines_come_once_and_a_line_that_is_being_written_waits(tmp_path):
    path = tmp_path / "lines.jsonl"
    growing = GrowingFile(path)
    assert growing.new_lines() == ([], False)
    path.write_bytes(b"1\n2\n3")
    assert growing.new_lines() == ([b"1", b"2"], False)
    assert growing.new_lines() == ([], False)
    with path.open("ab") as file:
        file.write(b"3\n")
    assert growing.new_lines() == ([b"33"], False)


def test_a_file_that_began_again_is_read_from_its_start(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"1\n2\n")
    growing = GrowingFile(path)
    growing.new_lines()

    path.write_bytes(b"1\n")  # shorter
    assert growing.new_lines() == ([b"1"], True)

    path.write_bytes(b"2\n3\n")  # the same file, longer, with another start
    assert growing.new_lines() == ([b"2", b"3"], True)

    other = tmp_path / "other"
    other.write_bytes(b"2\n4\n5\n")  # as a log that is cut back to a checkpoint and goes on: the same start
    os.replace(other, path)
    assert growing.new_lines() == ([b"2", b"4", b"5"], True)

    path.unlink()
    assert growing.new_lines() == ([], True)
    path.write_bytes(b"6\n")
    assert growing.new_lines() == ([b"6"], False)
