"""The first pass adds to gradients that are there already, and parameters that it leaves alone have none afterwards."""

from __future__ import annotations

import pytest
import tiny
import torch

from ray_peft.engine.contract import Computation, Rows, Seen, Share
from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.spec import TrialSpec


class Model(torch.nn.Module):
    """Layers named as those of a block, one of which no pass uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp_up, self.mlp_down, self.unused = (torch.nn.Linear(16, 16) for _ in range(3))

    def get_input_embeddings(self):
        return None

    def get_output_embeddings(self):
        return None

    def forward(self, rows):
        return self.mlp_down(self.mlp_up(rows.to(self.mlp_up.weight.dtype)).relu())


class TwoPasses(Rows):
    """Two passes of random rows a step."""

    def parts(self, step: int, share: Share, rows: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(4, 16, generator=generator) for _ in range(2)]

    def size(self, part):
        return 1

    def seen(self, step):
        return Seen(tokens=8)

    def epoch(self, steps):
        return 0.0


class MeanSquare(Computation):
    """The mean square of what a model says; `seen` has the storages of its gradients at the start of each pass."""

    def __init__(self, model, *, keeps_gradients):
        self.model, self.keeps_gradients, self.seen = model, keeps_gradients, []

    def inputs(self, part):
        return [part]

    def loss(self, rows):
        self.seen.append([weight.grad.data_ptr() for weight in self.model.parameters() if weight.grad is not None])
        return self.model(rows).float().square().mean()


STAGES = [FullFineTuning(weights="float32", weight_decay=0.5), GaLore(rank=4, targets=("mlp",), gradients="host")]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_kept_gradients_stay_where_they_are_and_train_the_same_weights(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 100)
    spec = TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", stage.plain(), train__steps=3, train__log_every=1))
    weights, computations, members = [], [], []
    for keeps_gradients in (True, False):
        model = stage.attach(Model())
        job = Job(spec, stage, 3, 0, tmp_path / str(keeps_gradients), "cpu", lambda metrics, step: None, lambda: 0.0)
        members.append(Member(job, model, TwoPasses()))
        computations.append(MeanSquare(model, keeps_gradients=keeps_gradients))
        Engine([members[-1]], model, members[-1].rows, computations[-1]).run()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert torch.equal(weights[0]["unused.weight"], stage.attach(Model()).unused.weight), "not even decayed"
    first, second, *later = computations[0].seen
    used = [pointer for pointer in first if pointer in second]
    assert len(used) == (4 if stage.name == "full" else 2), "of the host's, only biases are here"
    assert all(pointers == used for pointers in [second, *later])
    assert computations[1].seen[0] == []
