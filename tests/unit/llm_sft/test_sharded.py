"""A model that is spread over two workers trains, saves, resumes and scores as one that a single worker holds."""

from __future__ import annotations

import json
from functools import cache

import pytest
import tiny
from safetensors.torch import load_file
from sharded import attempt, by_two_workers

from ray_peft import cli
from ray_peft.spec import TrialSpec

CASES = {
    "lora": {"name": "lora", "rank": 4, "lr": 0.01, "dropout": 0.2},
    "full": {"name": "full", "lr": 0.003, "weights": "float32", "max_grad_norm": 0.5},
    "qlora": {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"},
    "none": {"name": "none"},
    "full-bfloat16": {"name": "full", "lr": 0.003},
}
SHORT = frozenset({"full"})
"""Cases of two processes that are not long."""
STEPS = 6
"""The fifth is the last of an epoch and has five rows: two micro-batches for the first worker, one for the second."""


def spec_of(model, rows, method, **changes):
    changes = {"train__steps": STEPS, "train__micro_batch_size": 2, "train__eval_every": 4} | changes
    plain = tiny.plain_spec(model, rows, method, **changes)
    plain["data"]["sources"][0]["train"] = 37
    return TrialSpec.from_plain(plain)


@pytest.fixture(scope="module")
def spread(tiny_model, questions, tmp_path_factory):
    """The row and the folder of a trial of two workers, by its name; `full` is stopped once, and goes on."""
    workers = {"resources__num_workers": 2, "resources__strategy": "fsdp", "train__checkpoint_every": 2}
    data = {"resources__num_workers": 2, "train__micro_batch_size": 4}
    specs = {
        "cramped": spec_of(tiny_model, questions, CASES["lora"], **data),
        **{
            name: spec_of(tiny_model, questions, method, **workers, train__gradient_checkpointing=name == "qlora")
            for name, method in CASES.items()
        },
    }

    @cache
    def trained(short):
        """Starting two processes takes longer than their trials, so trials share them."""
        chosen = {name: spec for name, spec in specs.items() if (name in SHORT) == short}
        folder = tmp_path_factory.mktemp("spread") / "two"
        return by_two_workers(chosen, folder, stopped={"full": 3}, cramped={"cramped": 2}), folder

    def of(name):
        rows, folder = trained(name in SHORT)
        return rows[name], folder / name

    return of


@pytest.fixture
def group_of_one():
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_single_worker_holds_the_only_part(group_of_one, tiny_model, questions, tmp_path, name):
    """In this process, so that it is quick: what is spread, gathered and saved, without others."""
    workers = {"resources__num_workers": 2, "resources__strategy": "fsdp"}
    with tiny.one_thread():
        row = attempt(spec_of(tiny_model, questions, CASES[name], **workers), tmp_path / "group")
        attempt(spec_of(tiny_model, questions, CASES[name]), tmp_path / "alone")
    assert "spread over workers" in row.passes, row.error
    assert points(tmp_path / "group") == pytest.approx(points(tmp_path / "alone"), rel=1e-5)
    assert answers(tmp_path / "group") == answers(tmp_path / "alone")


@pytest.mark.long
def test_all_workers_take_fewer_rows_where_one_ran_out_of_memory(spread, tiny_model, questions, tmp_path):
    row, folder = spread("cramped")
    assert (row.status, row.lowered["train.micro_batch_size"]) == ("finished", 2), row.error
    with tiny.one_thread():
        attempt(spec_of(tiny_model, questions, CASES["lora"], evaluation__generate=False), tmp_path)
    assert points(folder) == pytest.approx(points(tmp_path), rel=1e-5)


@pytest.mark.long
def test_each_worker_rounds_its_own_part_of_the_weights(spread, tiny_model, questions, tmp_path):
    """Other random bits than those of one worker, so the losses are near, and not equal."""
    row, folder = spread("full-bfloat16")
    assert row.status == "finished", row.error
    with tiny.one_thread():
        attempt(spec_of(tiny_model, questions, CASES["full-bfloat16"], evaluation__generate=False), tmp_path)
    own_bits, others = (
        {key: value for key, value in points(at).items() if key[1].endswith("_loss")} for at in (folder, tmp_path)
    )
    assert own_bits == pytest.approx(others, rel=2e-2)
    assert own_bits != pytest.approx(others, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in CASES if name != "full-bfloat16"],
)
def test_two_workers_give_the_numbers_of_one(spread, tiny_model, questions, tmp_path, name):
    row, folder = spread(name)
    with tiny.one_thread():
        expected = attempt(spec_of(tiny_model, questions, CASES[name]), tmp_path)
    assert (row.status, expected.status) == ("finished", "finished"), row.error
    assert row.resumed_from_step == (2 if name == "full" else None)
    assert len(points(folder)) == (1 if name == "none" else 3 * STEPS + 2)
    assert points(folder) == pytest.approx(points(tmp_path), rel=1e-5)
    exact = ("steps", "trainable_parameters", "total_parameters", "adapter_bytes", "four_bit_share", "storage")
    assert [getattr(row, key) for key in exact] == [getattr(expected, key) for key in exact]
    assert row.usage.train_tokens == expected.usage.train_tokens
    assert row.scores.eval_loss == pytest.approx(expected.scores.eval_loss, rel=1e-5)
    assert answers(folder) == answers(tmp_path)
    files = [path.name for path in tmp_path.glob("adapter/*.safetensors")]
    assert len(files) == (0 if name == "none" else 1)
    for file in files:
        weights, wanted = load_file(folder / "adapter" / file), load_file(tmp_path / "adapter" / file)
        assert weights.keys() == wanted.keys()
        for key, weight in weights.items():
            assert weight.float() == pytest.approx(wanted[key].float(), rel=1e-2, abs=1e-5), key  # saved in bfloat16
    if name != "none":
        assert "spread over workers" in row.passes


def test_a_plan_says_what_each_worker_takes(tiny_model, questions, tmp_path, capsys):
    changes = {"gpus_per_worker": 1, "num_workers": 2, "strategy": "fsdp"}
    plain = tiny.plain_spec(tiny_model, questions, CASES["full"], resources=changes)
    (tmp_path / "spread.yaml").write_text(json.dumps(plain), encoding="utf-8")
    plan = ["plan", str(tmp_path / "spread.yaml"), "--gpus", "2", "--gpu-memory-gib", "4"]
    assert cli.main(plan) == 0
    assert " GiB on each worker, 2 workers of " in capsys.readouterr().out
    assert cli.main([*plan, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {"weights", "gathered", "gradients", "optimizer"} <= set(row["components"])


def points(folder):
    """The logged losses, gradient norms and rates of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("train_loss", "grad_norm", "lr", "eval_loss")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def answers(folder):
    return [json.loads(line)["prediction"] for line in (folder / "answers.jsonl").read_text().splitlines()]
