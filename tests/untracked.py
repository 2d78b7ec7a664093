"""A trial without Ray and MLflow."""

from __future__ import annotations

import shutil

from ray_peft.trial import trial

HYBRID = {
    "name": "qlora_galore",
    "switch_at": 0.5,
    "qlora": {"rank": 4, "lr": 0.01, "compute_dtype": "float32"},
    "galore": {"rank": 8, "lr": 0.01, "weights": "float32"},
}


class Notes:
    """A tracker that keeps the rows it is given, the steps of metrics, and the names of artifacts."""

    def __init__(self):
        self.rows, self.artifacts, self.steps = [], [], []

    def start(self, spec):
        return "run"

    def log(self, metrics, step):
        self.steps.append((step, sorted(metrics)))

    def artifact(self, path, folder, *, remove=False):
        assert path.exists()
        self.artifacts.append(folder)
        if remove:
            shutil.rmtree(path)

    def table(self, rows, artifact_file):
        pass

    def fetch(self, run_id, folder, to):
        raise AssertionError("nothing to fetch here")

    def record(self, result):
        self.rows.append(result)
        return result


def run(spec, folder, stop_at=None):
    tracker = Notes()

    def progress(metrics, step):
        if step == stop_at and "train_loss" in metrics:
            raise KeyboardInterrupt

    return trial.run(spec, trial.Place(folder, "cpu"), tracker, progress), tracker
