"""The numbers that only a GPU has. Run with `make test-gpu`."""

from __future__ import annotations

import pytest
import tiny
import yaml

import ray_peft

pytestmark = pytest.mark.gpu


def test_a_sweep_on_a_gpu_measures_its_memory(tiny_model, questions, tmp_path):
    plain = tiny.plain_spec(tiny_model, questions, resources={"gpus_per_worker": 0.5}, train__precision="bf16")
    plain["method"] = {"grid": [{"name": "none"}, {"name": "lora", "rank": 4}, {"name": "qlora", "rank": 4}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    outcome = ray_peft.sweep(tmp_path / "space.yaml", out=tmp_path / "out")
    assert [result.status for result in outcome.results] == ["finished"] * 3
    for result in outcome.results:
        usage = result.usage
        assert usage.peak_allocated_gib is not None
        assert usage.peak_reserved_gib is not None
        assert 0 < usage.peak_allocated_gib <= usage.peak_reserved_gib
        assert usage.device_used_gib is None or usage.device_used_gib >= usage.peak_reserved_gib
