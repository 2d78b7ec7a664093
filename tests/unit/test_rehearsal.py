"""What fails on shapes fails before a sweep starts, once for each model and method."""

from __future__ import annotations

import sys

import pytest
import tiny

from ray_peft.checks import rehearsal
from ray_peft.errors import ModelError
from ray_peft.methods.lora import LoRA
from ray_peft.spec import TrialSpec


@pytest.fixture(scope="module")
def files(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    return tiny.build_model(folder / "model"), tiny.write_rows(folder / "rows.jsonl", tiny.QUESTIONS)


@pytest.fixture(autouse=True)
def _nothing_is_known(tmp_path, monkeypatch):
    """Predictions kept from earlier runs would pass without running anything."""
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["ray_peft.vram.predict"], "_known", {})


def trial(files, **changes) -> TrialSpec:
    return TrialSpec.from_plain(tiny.plain_spec(*files, **changes))


def test_trials_that_work_pass_without_a_word(files):
    methods = [{"name": "none"}, {"name": "lora", "rank": 2}, {"name": "full"}, {"name": "galore", "rank": 4}]
    assert rehearsal.rehearse([trial(files, method=method) for method in methods]) == []


def test_every_model_and_method_that_fails_is_named_once(files, monkeypatch):
    def attach(self, model):
        raise KeyError(f"no place for rank {self.rank}")

    monkeypatch.setattr(LoRA, "attach", attach)
    found = [trial(files, method={"name": "lora", "rank": rank, "lr": lr}) for rank in (5, 6) for lr in (0.1, 0.2)]
    with pytest.raises(ModelError) as error:
        rehearsal.rehearse([trial(files, method={"name": "none"}), *found])
    assert str(error.value).splitlines() == [
        f"method lora on model {files[0]}: attaching the method fails: KeyError: 'no place for rank {rank}'"
        for rank in (5, 6)
    ]


def test_a_forward_pass_that_fails_for_a_method_alone_is_an_error(files, monkeypatch):
    def attach(self, model):
        model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data[:, 1:]
        return model.requires_grad_(True)

    monkeypatch.setattr(LoRA, "attach", attach)
    with pytest.raises(ModelError, match=r"method lora on model .*: scoring a row fails: RuntimeError"):
        rehearsal.rehearse([trial(files, method={"name": "lora", "rank": 7})])


def test_what_shapes_cannot_tell_is_a_note(files, monkeypatch):
    def attach(self, model):
        raise NotImplementedError("aten::nonzero has no kernel here")

    monkeypatch.setattr(LoRA, "attach", attach)
    (note,) = rehearsal.rehearse([trial(files, method={"name": "lora", "rank": 8})])
    assert "cannot be tried on shapes (NotImplementedError" in note


def test_a_plan_says_it(files, monkeypatch, tmp_path, capsys):
    import yaml

    from ray_peft.cli import main

    def attach(self, model):
        raise ValueError("not on this model")

    monkeypatch.setattr(LoRA, "attach", attach)
    space = {"name": "s", **tiny.plain_spec(*files, method={"name": "lora", "rank": 3})}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    assert main(["plan", str(tmp_path / "s.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: method lora on model {files[0]}: attaching the method fails: ValueError: not on")
