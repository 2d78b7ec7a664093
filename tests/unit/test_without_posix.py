"""The package needs no module or call that only POSIX systems have. What only Windows can show is not tested here."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import ray_peft
from ray_peft.foundation.locks import locked
from ray_peft.foundation.processes import end_group

PACKAGE = Path(ray_peft.__file__).parent
ROOT = PACKAGE.parent
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "crypt", "spwd", "nis"}
POSIX_CALLS = {
    "os": {
        "killpg",
        "fork",
        "forkpty",
        "getuid",
        "geteuid",
        "getpgid",
        "setsid",
        "mkfifo",
        "sched_getaffinity",
        "uname",
    },
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGCHLD", "alarm", "setitimer", "pause"},
}
GUARDED = {
    "processes.py": {"os.killpg", "signal.SIGKILL"},  # only where os has killpg
    "hardware.py": {"os.sched_getaffinity"},  # only on Linux
    "requests.py": {"os.geteuid"},  # but on Windows
}


def sources():
    return [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py"), ROOT / "bootstrap.py"]


def test_no_file_imports_a_module_that_windows_lacks():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_MODULES & {name.partition(".")[0] for name in names}, path


def test_calls_that_windows_lacks_stand_behind_a_question_whether_they_are_there():
    for path in sources():
        used = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr in POSIX_CALLS.get(node.value.id, ())
        }
        assert used <= GUARDED.get(path.name, set()), path


def test_text_files_are_opened_with_their_encoding():
    for path in sources():
        if path.name == "bootstrap.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"


LONELY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("groups", [True, False], ids=["process groups", "none, as on Windows"])
def test_what_a_process_started_ends_with_it(groups, monkeypatch):
    if not groups:
        monkeypatch.delattr(os, "killpg")
    leader = subprocess.Popen([sys.executable, "-c", LONELY], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    end_group(leader)
    leader.wait(timeout=10)
    until = time.monotonic() + 10
    while time.monotonic() < until and psutil.pid_exists(child):
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(child)
    leader.stdout.close()
    end_group(leader)  # again does no harm


HOLD = """
import sys
from pathlib import Path
from ray_peft.foundation.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_for_one_process_and_free_after_its_holder_was_killed(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    with pytest.raises(TimeoutError), locked(path, 0.2):
        pass
    holder.kill()
    holder.communicate()
    with locked(path, 5), pytest.raises(TimeoutError), locked(path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "lock"):
        pass


def test_bootstrap_says_what_it_can_do_and_what_it_lacks():
    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / "bootstrap.py"), *arguments],
            capture_output=True, text=True, env={**os.environ, **environment}, cwd="/", check=False,
        )  # fmt: skip

    assert "quickstart" in run("--help").stdout
    assert run("--help").returncode == 0
    assert run("quickstrat").returncode == 2
    ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 7))
