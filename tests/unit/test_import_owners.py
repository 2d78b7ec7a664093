"""One owner per outside service, and a cheap import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ray_peft"
OWNERS = {
    "mlflow": {"store/tracking"},
    "ray.train": {"schedule/worker.py"},
    "ray.tune": {"schedule/tune.py", "schedule/early.py"},
    "ray.job_submission": {"schedule/jobs.py"},
    "optuna": {"schedule/study.py"},
    "trl": {"tasks/llm_sft", "vram"},  # vram stands in for its kernels on shapes
    "lm_eval": {"tasks/llm_sft/benchmarks.py"},
    "yaml": {"space/yaml_text.py", "tasks/llm_sft/task_files.py"},  # search spaces; lm-eval's own tags
    "matplotlib": {"report/drawing.py"},
    "fsspec": {"store/remote.py"},
    "pynvml": {"foundation/nvml.py", "doctor/hardware.py"},
}


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("library", OWNERS)
def test_each_outside_service_has_one_owner(library):
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == library or name.startswith(f"{library}.") for name in imported_names(path))
    }
    assert users, f"nobody imports {library}: the rule is out of date"
    owned = {user for user in users for owner in OWNERS[library] if user == owner or user.startswith(f"{owner}/")}
    strangers = users - owned
    assert not strangers


def test_specs_are_checked_without_the_heavy_libraries():
    code = (
        "import sys, ray_peft, ray_peft.spec, ray_peft.space, ray_peft.methods, ray_peft.cli\n"
        "import ray_peft.schedule.decide\n"
        "import ray_peft.report.files\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'datasets', 'evaluate', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_every_method_file_is_registered():
    from ray_peft.methods import METHODS

    shared = {"__init__", "base", "full_weights", "optimizers", "single", "stochastic"}
    shared |= {"matrix_weights", "projected_gradients", "turns", "lost_weights"}
    shared |= {"low_rank_rules", "piecewise_adamw", "muon_adamw", "layers_in_turn"}
    shared |= {"fused", "galore_adamw", "host_gradients", "moments", "subspace", "vocabulary"}
    shared |= {
        "adapter",
        "changed_base",
        "adapter_inputs",
        "config_fields",
        "kinds",
        "merging",
        "new_tokens",
        "rank_allocation",
        "saved_modules",
    }
    files = {path.stem for path in (PACKAGE / "methods").rglob("*.py")} - shared
    assert files == {method.__module__.rpartition(".")[2] for method in METHODS}
