"""Set up .venv and run one task: `python bootstrap.py quickstart` or `python bootstrap.py test`, on any system.

Needs Python 3.11 or later with the `venv` module, and a package index; nothing else. The Makefile calls it.

    venv         .venv with the exact versions in requirements.lock
    quickstart   compare fine-tuning methods on this machine, without a GPU
    test         the tests that need no GPU
    test-gpu     the tests that need one
    lint         ruff and mypy
    soak         a sweep whose processes are killed at random, for half an hour

Environment: PYTHON names the interpreter that .venv is made of (default: this one, or the newest that is found).
"""

# This file must parse with Python 3.7, so that an old one can say what is missing.
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
NEWER = ("python3.14", "python3.13", "python3.12", "python3.11", "python3", "python")
HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
BIN = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin")
READY = os.path.join(VENV, ".ready")
SOURCES = ("requirements.lock", "pyproject.toml")


def main(arguments):
    """Run one task; returns the exit code."""
    tasks = {"venv": [], "quickstart": QUICKSTART, "test": TEST, "test-gpu": TEST_GPU, "lint": LINT, "soak": SOAK}
    if len(arguments) != 1 or arguments[0] not in tasks:
        print(__doc__.strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    os.chdir(HERE)
    try:
        prepare()
        for command in tasks[arguments[0]]:
            code = subprocess.call([tool(command[0])] + command[1:])
            if code:
                return code
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


QUICKSTART = [
    ["python", "-m", "ray_peft.quickstart", "--out", "assets"],
    ["ray-peft", "sweep", "search_spaces/quickstart.yaml", "--out", "outputs/quickstart"],
]
TEST = [["python", "-m", "pytest", "-n", "2", "-m", "not gpu and not long"]]
TEST_GPU = [["python", "-m", "pytest", "-m", "gpu"]]
SOAK = [["python", "benchmarks/soak.py", "outputs/soak.json"]]
LINT = [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "ray_peft", "jobs"]]


class Failed(Exception):
    """The environment cannot be made; the text says why and what to do."""


def prepare():
    """Make .venv, unless it is newer than what it is made from."""
    if os.path.exists(READY) and all(os.path.getmtime(READY) >= os.path.getmtime(name) for name in SOURCES):
        return
    python = interpreter()
    print(f"setting up .venv with {python} ({version_text(python)}), once; about 3 minutes", flush=True)
    if subprocess.call([python, "-m", "venv", ".venv"]):
        raise Failed("no virtual environment can be made; on Debian and Ubuntu: apt-get install python3-venv")
    pip = [tool("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install(pip + ["-r", "requirements.lock"])
    # setuptools comes from the lock, so the build needs no environment of its own.
    install(pip + ["--no-build-isolation", "--no-deps", "-e", "."])
    with open(READY, "w"):
        pass


def install(command):
    """Run pip."""
    if subprocess.call(command):
        raise Failed("packages could not be installed; what pip says stands above")


def interpreter():
    """The Python that .venv is made of."""
    chosen = os.environ.get("PYTHON")
    if chosen:
        if not shutil.which(chosen):
            raise Failed(f"PYTHON={chosen}: no such program")
        if version(chosen) < OLDEST:
            raise Failed(f"ray_peft needs Python 3.11 or later, but PYTHON={chosen} is {version_text(chosen)}")
        return chosen
    candidates = [sys.executable] + [python for python in map(shutil.which, NEWER) if python]
    for python in candidates:
        if version(python) >= OLDEST:
            return python
    raise Failed(
        f"ray_peft needs Python 3.11 or later, but here is {version_text(sys.executable)}; install a later one, or "
        "name it: PYTHON=/path/to/python3.12"
    )


def version(python):
    """Its version as numbers; zeros if it does not run."""
    try:
        text = subprocess.check_output(
            [python, "-c", "import sys; print('%d %d %d' % sys.version_info[:3])"], stderr=subprocess.DEVNULL
        )
        return tuple(int(part) for part in text.split())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return (0, 0, 0)


def version_text(python):
    """Such as "Python 3.12.1"."""
    return "Python " + ".".join(str(part) for part in version(python))


def tool(name):
    """A program of .venv."""
    return os.path.join(BIN, name + (".exe" if os.name == "nt" else ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
