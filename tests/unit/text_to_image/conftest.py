"""One trained trial without Ray, for the tests of training, saving and loading."""

from __future__ import annotations

import shutil

import pytest
import tiny
import tiny_diffusion

from ray_peft.spec import TrialSpec
from ray_peft.tasks.text_to_image.task import TextToImage


class Killed(Exception):
    """Stands for a trial that ends in mid-training."""


class Trained:
    """A bench after training, and what was reported meanwhile."""

    def __init__(self, spec, folder, *, killed_at=None, hook=None):
        self.spec, self.log = spec, []
        self.bench = TextToImage().load(spec, "cpu")
        self.base = self.bench.eval_loss()
        ((stage, steps),) = spec.method.stages(self.bench.total_steps())
        self.bench.attach(stage)

        def report(metrics, step):
            self.log.append({"step": step, **metrics})
            if hook is not None:
                hook(self.bench)
            if step == killed_at:
                raise Killed

        self.outcome = self.bench.train(stage, steps, 0, folder, report)

    @property
    def losses(self):
        return [line["train_loss"] for line in self.log if "train_loss" in line]


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="session")
def train(tiny_painter, paintings):
    """Trains one trial of the tiny pipeline on the paintings."""

    def run(folder, method=None, *, killed_at=None, hook=None, **changes):
        plain = tiny_diffusion.plain_spec(tiny_painter, paintings, method, **changes)
        return Trained(TrialSpec.from_plain(plain), folder, killed_at=killed_at, hook=hook)

    run.killed = Killed
    return run


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """Twelve paintings of 100 x 80 pixels with metadata.jsonl; not to be changed."""
    return tiny_diffusion.write_images(tmp_path_factory.mktemp("images") / "paintings", 12)


@pytest.fixture
def folder(gallery, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(gallery, tmp_path / "paintings")
