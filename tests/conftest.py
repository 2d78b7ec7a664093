"""What all tests share: one tiny model, one data file, one cache, one Ray."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

sys.path.insert(0, str(Path(__file__).parent))

import tiny  # noqa: E402
import tiny_diffusion  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_PEFT_OUTPUTS"):
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell script starts background commands so, and what tests start would be as deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side; set before torch is loaded

# One worker runs these, so that there is one Ray. test_cli.py comes first: it also looks at what happens without one.
SHARED_RAY = (
    *(f"tests/end_to_end/test_{name}.py" for name in ("cli", "nothing_lost", "store_away", "sweep", "sweep_images")),
    "tests/end_to_end/test_sweep_bucket.py",
    "tests/end_to_end/test_control.py",
    "tests/end_to_end/test_sweep_packs.py",
    "tests/unit/test_sizes.py",
)
# Files of long tests, most of which start sweeps as commands of their own: begun late, they would leave a worker idle.
LONG = tuple(f"tests/end_to_end/test_{name}.py" for name in ("kills", "compare", "jobs", "plan", "worker_killed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share Ray come first, then the long ones."""
    items.sort(key=lambda item: (not item.nodeid.startswith(SHARED_RAY), not item.nodeid.startswith(LONG)))


_frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Leave what was imported since the last time out of collections of garbage: each takes 0.6 s otherwise."""
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 200:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """With `pytest -n 2`, a file stays on one worker, and so do all the files that share Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(SHARED_RAY) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # more tests in a file do not mean more work
    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is built once per test run; prepared data is cached in it."""
    folder = tmp_path_factory.mktemp("shared")
    os.environ["RAY_PEFT_CACHE"] = str(folder / "cache")
    os.environ["RAY_PEFT_OUTPUTS"] = str(folder / "outputs")
    return folder


@pytest.fixture(scope="session")
def tiny_model(shared: Path) -> Path:
    """The tiny model's folder."""
    return tiny.build_model(shared / "tiny-llama")


@pytest.fixture(scope="session")
def questions(shared: Path) -> Path:
    """Sixty prompt and completion rows."""
    return tiny.write_rows(shared / "questions.jsonl", tiny.QUESTIONS)


@pytest.fixture(scope="session")
def tiny_painter(shared: Path) -> Path:
    """The folder of the tiny Stable Diffusion pipeline."""
    return tiny_diffusion.build_pipeline(shared / "tiny-painter")


@pytest.fixture(scope="session")
def paintings(shared: Path) -> Path:
    """Eight paintings with captions."""
    return tiny_diffusion.write_images(shared / "paintings", 8)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store without runs: building the schema takes seconds, so tests copy it."""
    from ray_peft.store.tracking import default_uri, open_store

    folder = tmp_path_factory.mktemp("empty_store")
    open_store(default_uri(folder), "unused", folder / "artifacts")
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def ray_cluster(shared: Path) -> Iterator[object]:
    """One local Ray of two cores for all tests that need one."""
    import ray

    from ray_peft.schedule import cluster

    with cluster.connect() as nodes:
        yield nodes
    assert not ray.is_initialized()
