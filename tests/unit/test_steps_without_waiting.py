"""Between two lines of the log nothing asks a tensor for its value, which on a GPU would wait for it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ray_peft.engine.contract import Rows, Seen
from ray_peft.engine.member import Job, Member
from ray_peft.methods.full import FullFineTuning
from ray_peft.methods.galore import GaLore
from ray_peft.methods.host_gradients import HostGaLoreAdamW
from ray_peft.spec import TrialSpec

STAGES = {
    "full": FullFineTuning(),
    "full, float32": FullFineTuning(weights="float32"),
    "galore": GaLore(rank=4, targets=("mlp",), weight_decay=0.1),
    "galore, float32": GaLore(rank=4, targets=("mlp",), weights="float32"),
    "galore, 8 bits, host": GaLore(rank=64, targets=("mlp",), moments="8bit", gradients="host"),
    "galore, layerwise": GaLore(rank=4, targets=("mlp",), layerwise=True, max_grad_norm=None),
}


class Asked(TorchDispatchMode):
    """Counts what reads a value, or makes a tensor whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class NoRows(Rows):
    """Steps that see nothing."""

    def parts(self, step, share, rows):
        return []

    def size(self, part):
        return 0

    def seen(self, step):
        return Seen()

    def epoch(self, steps):
        return 0.0


class Model(torch.nn.Module):
    """Two layers named as those of a block, and an embedding."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 80)
        self.mlp_up, self.mlp_down = torch.nn.Linear(80, 96), torch.nn.Linear(96, 80)

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return None

    def forward(self, ids):
        return self.mlp_down(self.mlp_up(self.words(ids)).relu())


@pytest.mark.parametrize("name", STAGES)
def test_a_pass_and_a_step_ask_for_nothing(name, tmp_path, monkeypatch):
    import tiny

    monkeypatch.setattr("ray_peft.methods.host_gradients.SMALL", 100)
    stage = STAGES[name]
    spec = TrialSpec.from_plain(
        tiny.plain_spec("m/m", "d/d", stage.plain(), train__log_every=100, train__micro_batch_size=8)
    )
    model = stage.attach(Model())
    job = Job(spec, stage, 10, 0, tmp_path, "cpu", lambda metrics, step: None, lambda: 0.0)
    member = Member(job, model, NoRows())
    loss = torch.zeros(())

    def step():
        for _ in range(1 if stage.updates_in_backward else 2):
            value = model(torch.arange(12).view(3, 4)).float().square().mean()
            value.backward()
        loss.add_(value.detach())
        member.end_step(loss, keep_gradients=True)

    step()  # the first finds the subspaces, which may wait
    with Asked() as asked:
        for _ in range(3):
            step()
    assert asked.names == []
    assert isinstance(member.optimizer, HostGaLoreAdamW) == (name == "galore, 8 bits, host")


def test_the_count_sees_who_asks():
    with Asked() as asked:
        torch.ones(()).item()
    assert asked.names
