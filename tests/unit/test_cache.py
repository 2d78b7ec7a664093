"""A folder of the cache is whole or absent, whoever fills it."""

import pytest

from ray_peft.errors import StorageError
from ray_peft.foundation.cache import made_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_absent_until_it_is_whole(tmp_path):
    folder = tmp_path / "deep" / "abc"
    with made_whole(folder, "last") as partial:
        (partial / "first").write_text("1")
        (partial / "last").write_text("2")
        assert not folder.exists()
    assert names(folder) == ["first", "last"]
    assert names(folder.parent) == ["abc"]


def test_an_error_leaves_nothing(tmp_path):
    def fill():
        with made_whole(tmp_path / "abc", "last") as partial:
            (partial / "last").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert names(tmp_path) == []


def test_who_was_first_is_kept(tmp_path):
    with made_whole(tmp_path / "abc", "last") as second:
        (second / "last").write_text("second")
        with made_whole(tmp_path / "abc", "last") as first:
            (first / "last").write_text("first")
    assert (tmp_path / "abc" / "last").read_text() == "first"
    assert names(tmp_path) == ["abc"]


def test_a_place_that_is_taken_by_half_a_folder_is_an_error(tmp_path):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "first").write_text("")

    def fill():
        with made_whole(tmp_path / "abc", "last") as partial:
            (partial / "last").write_text("")

    with pytest.raises(StorageError, match="abc: cannot be written"):
        fill()
    assert names(tmp_path) == ["abc"]
