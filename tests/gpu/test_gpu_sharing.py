"""What only a GPU shows of trials that share it, and of trials that outgrow it. Run with `make test-gpu`."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import tiny
import tiny_diffusion

import ray_peft
from ray_peft.checks.inspector import Inspector
from ray_peft.foundation.nvml import gpu_memory
from ray_peft.foundation.units import GIB
from ray_peft.schedule import plan
from ray_peft.space.read import Space, TrackingSpec
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger
from ray_peft.tasks import TASKS
from ray_peft.vram.cards import Gpu, known

pytestmark = pytest.mark.gpu

TOKENS = 512
LIAR_GIB = 1.6
"""What a trial asks for that takes 2 GB before its first row."""


def build_config(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Llama's config and tokenizer; its weights are drawn when it is loaded."""
    from transformers import LlamaConfig

    folder.mkdir()
    tiny.build_tokenizer(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=272, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=TOKENS,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def text_trial(model: Path, rows: Path, method: dict[str, object], *, micro: int, batch: int, share: float = 1.0):
    """A trial on rows that all have `TOKENS` tokens, in float32: equal mathematics gives equal numbers."""
    plain = tiny.plain_spec(
        model, rows, method, model__random_weights=True, data__max_length=TOKENS, train__batch_size=batch,
        train__micro_batch_size=micro, train__steps=6, train__loss="all",
        evaluation={"generate": False}, resources={"gpus_per_worker": share, "cpus_per_worker": 2},
    )  # fmt: skip
    return Inspector().settled(TrialSpec.from_plain(plain))  # under the id that a sweep gives it


@pytest.fixture
def long_rows(tmp_path) -> Path:
    draw = random.Random(0)
    rows = [
        {key: "".join(draw.choices("abcdefgh ", k=size)) for key, size in (("prompt", 64), ("completion", 2 * TOKENS))}
        for _ in range(80)
    ]
    return tiny.write_rows(tmp_path / "long_rows.jsonl", rows)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    """The GPU that is here; asked without a CUDA context."""
    found = gpu_memory("0")
    if found is None:
        pytest.skip("NVML does not answer")
    return replace(known(found.name), memory_gib=found.total_gib)


def swept(out: Path, trials: list[TrialSpec], cap_gib: float | None = None) -> list[ray_peft.TrialResult]:
    """The rows of the trials, in their order."""
    space = Space(
        name=out.name, description="", trials=trials, search=None, tracking=TrackingSpec(),
        templates=[trial.plain() for trial in trials],
    )  # fmt: skip
    rows = {row.trial_id: row for row in ray_peft.sweep(space, out=out, gpu_memory_gib=cap_gib).results}
    return [rows[trial.trial_id] for trial in trials]


def losses(out: Path, trial: TrialSpec) -> list[float]:
    """The logged training losses by step; of a step that was done again, the last."""
    log = Ledger(out).trial_folder(trial.trial_id) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    return [found[step] for step in sorted(found)]


def cap_between(gpu: Gpu, held: TrialSpec, more: TrialSpec) -> float:
    """GiB of a card that holds the first trial, but not the second."""
    least, most = (TASKS[each.task].predict(each, gpu) for each in (held, more))
    assert least is not None
    assert most is not None
    assert least.peak_reserved < most.peak_allocated
    return (gpu.context + (least.peak_reserved + most.peak_allocated) / 2) / GIB


def test_a_trial_that_lies_about_its_memory_does_not_harm_its_neighbour(shared, gpu, long_rows, tmp_path):
    """Its share holds no row of it: it runs out of memory alone, beside a trial whose numbers stay the same."""
    small = build_config(tmp_path / "small", hidden=256, layers=4)
    large = build_config(tmp_path / "large", hidden=1024, layers=8)
    honest = text_trial(small, long_rows, {"name": "lora", "rank": 4}, micro=4, batch=8, share=0.5)
    share = round(LIAR_GIB / gpu.memory_gib, 4)
    liar = text_trial(large, long_rows, {"name": "full", "weights": "float32"}, micro=1, batch=8, share=share)
    (alone,) = swept(tmp_path / "alone", [honest])
    beside, lied = swept(tmp_path / "beside", [honest, liar])
    assert [alone.status, beside.status, lied.status] == ["finished", "finished", "out_of_memory"]
    assert lied.error
    assert lied.lowered == {}
    expected = losses(tmp_path / "alone", honest)
    assert len(expected) == 6
    assert losses(tmp_path / "beside", honest) == pytest.approx(expected, rel=0, abs=1e-6)


def test_a_trial_that_outgrows_its_memory_goes_on_with_fewer_rows_and_equal_losses(shared, gpu, long_rows, tmp_path):
    model = build_config(tmp_path / "wide", hidden=512, layers=4)

    def made(micro: int) -> TrialSpec:
        return text_trial(model, long_rows, {"name": "lora", "rank": 4}, micro=micro, batch=32)

    cap_gib = cap_between(gpu, made(8), made(16))
    (plain,), (capped,) = (
        swept(tmp_path / "plain", [made(32)]),
        swept(tmp_path / "capped", [made(32)], cap_gib),
    )
    assert [plain.status, capped.status] == ["finished", "finished"]
    assert plain.lowered == {}
    assert capped.lowered.get("train.micro_batch_size") == 8
    assert capped.usage.peak_reserved_gib is not None
    assert capped.usage.peak_reserved_gib <= cap_gib
    expected = losses(tmp_path / "plain", made(32))
    assert len(expected) == 6
    assert losses(tmp_path / "capped", made(32)) == pytest.approx(expected, rel=0, abs=1e-5)


def test_images_that_outgrow_the_memory_go_on_with_fewer_and_equal_losses(shared, gpu, tiny_painter, tmp_path):
    paintings = tiny_diffusion.write_images(tmp_path / "large_paintings", 8, side=512)

    def made(micro: int) -> TrialSpec:
        plain = tiny_diffusion.plain_spec(
            tiny_painter, paintings, data__resolution=512, train__batch_size=32, train__micro_batch_size=micro,
            train__steps=4, evaluation__prompts=[], resources={"gpus_per_worker": 1.0, "cpus_per_worker": 2},
        )  # fmt: skip
        return TrialSpec.from_plain(plain)

    cap_gib = cap_between(gpu, made(8), made(16))
    (plain,), (capped,) = (
        swept(tmp_path / "plain", [made(32)]),
        swept(tmp_path / "capped", [made(32)], cap_gib),
    )
    assert [plain.status, capped.status] == ["finished", "finished"]
    assert capped.lowered.get("train.micro_batch_size", 32) < 32
    expected = losses(tmp_path / "plain", made(32))
    assert len(expected) == 4
    # Convolutions round to TF32, and cuDNN chooses others for other numbers of images.
    assert losses(tmp_path / "capped", made(32)) == pytest.approx(expected, rel=1e-3)


def open_trials(model: Path, rows: Path, count: int) -> list[TrialSpec]:
    """Trials that leave their share of the GPU open."""
    made = []
    for seed in range(count):
        trial = text_trial(model, rows, {"name": "lora", "rank": 4}, micro=4, batch=8).plain()
        trial["resources"]["gpus_per_worker"] = None
        made.append(TrialSpec.from_plain(trial | {"seed": seed}))
    return made


def test_trials_share_a_gpu_by_predicted_bytes(shared, gpu, long_rows, tmp_path):
    model = build_config(tmp_path / "small", hidden=256, layers=4)
    rows = swept(tmp_path / "shared", open_trials(model, long_rows, 2), cap_gib=12.0)
    assert [row.status for row in rows] == ["finished"] * 2
    for row in rows:
        assert 0 < row.provenance.gpus_per_worker < 0.5
        assert row.usage.peak_reserved_gib <= 12.0 * row.provenance.gpus_per_worker
        assert row.usage.evaluation_allocated_gib > 0
    begins = [datetime.fromisoformat(row.provenance.started_at).timestamp() for row in rows]
    assert abs(begins[0] - begins[1]) < max(row.usage.wall_time_s for row in rows)


def test_a_plan_says_what_the_trials_of_a_sweep_hold_and_choose(shared, gpu, long_rows, tmp_path):
    model = build_config(tmp_path / "small", hidden=256, layers=4)
    trials = open_trials(model, long_rows, 2)
    trials.append(text_trial(model, long_rows, {"name": "lora", "rank": 8}, micro=1, batch=8, share=0.5))
    plain = [{**trial.plain(), "train": {**trial.plain()["train"], "fit": "auto"}} for trial in trials]
    trials = [Inspector().settled(TrialSpec.from_plain(each)) for each in plain]
    planned = {run.trial.trial_id: run.demand for run in plan.planned(trials, 6.0, gpu_name=gpu.name).runs}
    rows = swept(tmp_path / "planned", trials, cap_gib=6.0)
    assert [row.status for row in rows] == ["finished"] * 3
    assert {row.trial_id: (row.provenance.gpus_per_worker, row.chosen) for row in rows} == {
        trial_id: (demand.gpus_per_worker, dict(demand.chosen)) for trial_id, demand in planned.items()
    }
    assert all(row.chosen for row in rows)


def test_a_share_that_was_too_small_is_mended_by_running_alone(shared, gpu, long_rows, tmp_path, monkeypatch):
    """The share is what is wrong here: with a thirty-second of 20 GiB the CUDA context leaves nothing."""
    monkeypatch.setattr("ray_peft.schedule.decide.share_of", lambda *_: 1 / 32)
    model = build_config(tmp_path / "small", hidden=256, layers=4)
    (row,) = swept(tmp_path / "alone", open_trials(model, long_rows, 1), cap_gib=20.0)
    assert (row.status, row.provenance.gpus_per_worker) == ("finished", 1.0)
    kept = [json.loads(line) for line in (tmp_path / "alone" / "results.jsonl").read_text().splitlines()]
    assert [each["status"] for each in kept] == ["out_of_memory", "finished"]
