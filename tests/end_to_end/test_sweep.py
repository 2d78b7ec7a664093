"""A real sweep: YAML -> Ray -> training -> MLflow -> report, and what is left when things go wrong."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import released
import tiny
import yaml

import ray_peft
from ray_peft.console import Console
from ray_peft.errors import PlacementError, ReportLost, TrackingError
from ray_peft.store.results_file import read_results

METHODS = [
    {"name": "none"},
    {"name": "lora", "rank": 4, "lr": 0.01},
    {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"},
    {"name": "galore", "rank": 8, "lr": 0.01, "scale": 1.0},
    {
        "name": "qlora_galore",
        "qlora": {"rank": 4, "lr": 0.01, "compute_dtype": "float32"},
        "galore": {"rank": 8, "lr": 0.01},
    },
    {"name": "full", "lr": 1.0e30, "max_grad_norm": None},  # diverges: a failed row
]
ENSEMBLES = [
    {"name": "ensemble", "members": [{"method": METHODS[place]} for place in places]}
    for places in ((1, 3), (1, 5))  # LoRA and GaLore; one with the member that fails
]


def write_space(path: Path, model: Path, data: Path, methods, **changes) -> Path:
    plain = tiny.plain_spec(model, data, **changes)
    plain["method"] = {"grid": methods}
    path.write_text(yaml.safe_dump({"name": path.stem, "description": "A test.", **plain}), encoding="utf-8")
    return path


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def swept(ray_cluster, shared, tiny_model, questions, tmp_path_factory):
    """One sweep over all methods, of which one fails."""
    folder = tmp_path_factory.mktemp("swept")
    sources = [{"recipe": "prompt_completion", "path": str(questions), "train": 40, "validation": 6, "test": 8}]
    methods = [*ENSEMBLES, *METHODS]  # an ensemble runs after its members, wherever it stands
    changes = {"train__steps": 6, "data__sources": sources}
    space = write_space(folder / "all_methods.yaml", tiny_model, questions, methods, **changes)
    outcome = ray_peft.sweep(space, out=folder / "out", console=Console())
    return space, outcome


def test_every_planned_trial_has_a_row_and_the_failed_one_its_reason(swept):
    _, outcome = swept
    assert sorted((result.spec.method.name, result.status) for result in outcome.results) == [
        ("ensemble", "failed"), ("ensemble", "finished"), ("full", "failed"), ("galore", "finished"),
        ("lora", "finished"), ("none", "finished"), ("qlora", "finished"), ("qlora_galore", "finished"),
    ]  # fmt: skip
    assert not outcome.complete
    (failed,) = [result for result in outcome.results if result.spec.method.name == "full"]
    assert "is nan at step" in failed.error


def test_results_jsonl_has_the_documented_keys(swept):
    _, outcome = swept
    rows = [json.loads(line) for line in (outcome.folder / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert {"trial_id", "status", "spec", "trainable_parameters", "adapter_bytes", "mlflow_run_id"} <= set(row)
        assert {"eval_loss", "bleu4", "rouge_l"} <= set(row["scores"])
        assert {"peak_allocated_gib", "peak_reserved_gib", "wall_time_s", "tokens_per_s"} <= set(row["usage"])
    tuned = [row for row in rows if row["spec"]["method"]["name"] in ("lora", "qlora", "galore", "qlora_galore")]
    base = next(row for row in rows if row["spec"]["method"]["name"] == "none")
    assert base["trainable_parameters"] == 0
    for row in tuned:
        assert row["scores"]["eval_loss"] < base["scores"]["eval_loss"] - 0.1
        assert row["usage"]["peak_rss_gib"] > 0.1
        assert row["usage"]["tokens_per_s"] > 0
        assert row["adapter_bytes"] > 0


def test_the_hybrid_s_merge_has_its_cost_as_a_number(swept):
    _, outcome = swept
    (hybrid,) = [result for result in outcome.results if result.spec.method.name == "qlora_galore"]
    stage, merge = hybrid.boundary_losses["after stage 1"], hybrid.boundary_losses["after merge 1"]
    assert abs(stage - merge) < 0.05
    assert hybrid.scores.eval_loss < merge
    assert hybrid.steps == 6
    files = {item.path for item in client(outcome.tracking_uri).list_artifacts(hybrid.mlflow_run_id)}
    assert {"stage1_adapter", "adapter"} <= files


def test_an_ensemble_is_a_row_with_its_weights_and_the_cost_of_its_members(swept):
    _, outcome = swept
    rows = {result.trial_id: result for result in outcome.results}
    done, broken = [result for result in outcome.results if result.spec.method.name == "ensemble"]
    members = [rows[member.trial_id] for member in done.spec.members()]
    assert list(done.members) == [member.trial_id for member in members]
    assert sum(done.members.values()) == pytest.approx(1)
    assert done.scores.eval_loss < max(member.scores.eval_loss for member in members)
    assert done.scores.generated_rows == 4
    assert done.usage.train_s == pytest.approx(sum(member.usage.train_s for member in members))
    assert done.adapter_bytes == sum(member.adapter_bytes for member in members)
    assert broken.status == "failed"
    (full,) = [result for result in outcome.results if result.spec.method.name == "full"]
    assert broken.error == f"member {full.trial_id} is failed; an ensemble needs all its members finished"
    assert client(outcome.tracking_uri).get_run(done.mlflow_run_id).info.status == "FINISHED"


def test_the_report_names_every_trial(swept):
    _, outcome = swept
    report = (outcome.folder / "report.md").read_text(encoding="utf-8")
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    for result in outcome.results:
        assert result.trial_id in report
        assert result.trial_id in page
    for section in ("Recommendation", "Which differences are shown", "Loss over steps", "Between stages", "Ensembles"):
        assert f"## {section}\n" in report
    assert "plots/losses.svg" in report
    assert len((outcome.folder / "report.csv").read_text(encoding="utf-8").splitlines()) == 9


def test_mlflow_holds_parent_children_parameters_curves_and_artifacts(swept):
    _, outcome = swept
    mlflow = client(outcome.tracking_uri)
    (lora,) = [result for result in outcome.results if result.spec.method.name == "lora"]
    run = mlflow.get_run(lora.mlflow_run_id)
    parent = mlflow.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FAILED"  # one trial failed
    kept = {item.path for item in mlflow.list_artifacts(parent.info.run_id)}
    assert {"report.html", "report.md", "report.csv", "results.jsonl", "plots"} <= kept
    assert run.info.status == "FINISHED"
    assert run.data.params["method.rank"] == "4"
    assert run.data.params["train.batch_size"] == "8"
    losses = mlflow.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1].value < losses[0].value
    files = {item.path for item in mlflow.list_artifacts(run.info.run_id)}
    assert {"adapter", "spec.json", "samples.json", "result.json"} <= files
    assert {item.path for item in mlflow.list_artifacts(run.info.run_id, "adapter")} >= {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    (diverged,) = [result for result in outcome.results if result.spec.method.name == "full"]
    failed = mlflow.get_run(diverged.mlflow_run_id)
    assert failed.info.status == "FAILED"
    assert "is nan at step" in failed.data.tags["ray_peft.error"]


def test_a_saved_adapter_gives_the_recorded_loss_again(swept, tmp_path):
    from mlflow.artifacts import download_artifacts
    from peft import PeftModel

    from ray_peft.tasks.llm_sft.task import LlmSft

    _, outcome = swept
    (lora,) = [result for result in outcome.results if result.spec.method.name == "lora"]
    folder = download_artifacts(
        artifact_uri=f"runs:/{lora.mlflow_run_id}/adapter", dst_path=str(tmp_path), tracking_uri=outcome.tracking_uri
    )
    bench = LlmSft().load(lora.spec, "cpu")
    bench.model = PeftModel.from_pretrained(bench.model, folder)
    assert bench.eval_loss() == pytest.approx(lora.scores.eval_loss, rel=5e-3)  # saved in bfloat16


@pytest.mark.parametrize(
    ("method", "form", "dtype"),
    [
        ("lora", "adapter", "fp16"),
        ("lora", "merged", "fp32"),
        ("qlora", "merged", "bf16"),
        ("galore", "merged", "fp32"),
    ],
)
def test_exported_weights_load_with_the_plain_libraries_and_keep_the_loss(
    swept, tiny_model, tmp_path, capsys, method, form, dtype
):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from ray_peft.cli import main

    _, outcome = swept
    (result,) = [each for each in outcome.results if each.spec.method.name == method]
    given = [result.mlflow_run_id, "--format", form, "--dtype", dtype, "--tracking-uri", outcome.tracking_uri]
    assert main(["export", *given, "--out", str(tmp_path / "exported")]) == 0
    made = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert made["eval_loss_before"] == pytest.approx(result.scores.eval_loss, rel=5e-3)  # it was saved in bfloat16
    assert made["eval_loss_after"] == pytest.approx(made["eval_loss_before"], rel=5e-3)
    assert f"{made['eval_loss_after']:.4f} as exported" in capsys.readouterr().out
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if form == "adapter":
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = PeftModel.from_pretrained(base, tmp_path / "exported")
        assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
        tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
        assert model.dtype == wanted
        assert not hasattr(model.config, "quantization_config")
    assert main(["export", *given, "--out", str(tmp_path / "exported")]) == 2  # not over what is there


def test_an_adapter_becomes_a_gguf_file_that_transformers_reads(swept, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from ray_peft.cli import main

    _, outcome = swept
    (lora,) = [each for each in outcome.results if each.spec.method.name == "lora"]
    given = ["--format", "gguf", "--dtype", "fp32", "--tracking-uri", outcome.tracking_uri]
    assert main(["export", lora.mlflow_run_id, *given, "--out", str(tmp_path / "exported")]) == 0
    (file,) = (tmp_path / "exported").glob("*.gguf")
    summary = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert summary["num_bytes"] == file.stat().st_size
    assert summary["eval_loss_after"] == pytest.approx(lora.scores.eval_loss, rel=5e-3)
    assert AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).config.model_type == "llama"


def test_trials_answer_side_by_side_and_remember_what_was_said(swept, tmp_path, capsys, monkeypatch):
    from ray_peft.cli import main
    from ray_peft.tasks.llm_sft import evaluate

    _, outcome = swept
    prompts = []
    answers = evaluate.answers
    monkeypatch.setattr(evaluate, "answers", lambda spec, model, tokenizer, rows: prompts.append(
        (spec.trial_id, tokenizer.decode(rows["prompt_ids"][0]))
    ) or answers(spec, model, tokenizer, rows))  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("What comes after one?\nAnd then?\n/new\nAnd then?\n/quit\nno\n"))
    named = {each.spec.method.name: each for each in outcome.results}
    trials = [named["lora"].trial_id, named["galore"].mlflow_run_id]
    given = ["--base", "--max-new-tokens", "8", "--tracking-uri", outcome.tracking_uri]
    assert main(["chat", *trials, *given]) == 0
    told = capsys.readouterr().out
    heads = [line for line in told.splitlines() if "(lora)" in line]
    assert len(heads) == 3
    assert all("(galore)" in line and "the untouched base" in line for line in heads)
    of_lora = [prompt for trial_id, prompt in prompts if trial_id == prompts[0][0]]
    assert [prompt.count("<|im_start|>user") for prompt in of_lora] == [1, 2, 1]
    assert "What comes after one?" in of_lora[1]
    assert len({prompt for _, prompt in prompts[:3]}) == 1  # all are asked the same


def test_an_export_with_another_loss_is_refused_and_leaves_nothing(swept, tmp_path, capsys, monkeypatch):
    from ray_peft.cli import main
    from ray_peft.methods.lora import LoRA

    monkeypatch.setattr(LoRA, "merge", lambda stage, model: model.unload())  # forgets the adapter
    _, outcome = swept
    (lora,) = [each for each in outcome.results if each.spec.method.name == "lora"]
    given = [lora.mlflow_run_id, "--format", "merged", "--dtype", "fp32", "--tracking-uri", outcome.tracking_uri]
    assert main(["export", *given, "--out", str(tmp_path / "exported")]) == 2
    assert "writing merged weights in float32 changed the held-out loss from " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_with_the_way_out(swept, tmp_path, capsys):
    from ray_peft.cli import main

    _, outcome = swept
    rows = {(each.spec.method.name, each.status): each for each in outcome.results}
    for key, says in {
        ("galore", "finished"): "trained all weights and has no adapter; use merged",
        ("ensemble", "finished"): "export its members: lora-",
        ("none", "finished"): "has no adapter",
    }.items():
        given = [
            "export",
            rows[key].mlflow_run_id,
            "--tracking-uri",
            outcome.tracking_uri,
            "--out",
            str(tmp_path / "no"),
        ]
        assert main(given) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_the_same_command_again_runs_only_what_did_not_finish(swept, monkeypatch):
    space, outcome = swept
    before = (outcome.folder / "results.jsonl").read_text().splitlines()
    again = ray_peft.sweep(space, out=outcome.folder)
    after = (outcome.folder / "results.jsonl").read_text().splitlines()
    assert after[:8] == before
    assert [json.loads(line)["spec"]["method"]["name"] for line in after[8:]] == ["full", "ensemble"]
    assert len(again.results) == 8
    mlflow = client(again.tracking_uri)
    parents = {mlflow.get_run(result.mlflow_run_id).data.tags["mlflow.parentRunId"] for result in again.results}
    assert len(parents) == 1


def test_a_trial_runs_again_from_its_mlflow_run_alone_with_the_same_result(swept, tmp_path):
    from ray_peft.store import tracking

    _, outcome = swept
    (lora,) = [result for result in outcome.results if result.spec.method.name == "lora"]
    spec = tracking.load_spec(outcome.tracking_uri, lora.mlflow_run_id)
    assert spec == lora.spec
    again = ray_peft.run(spec, out=tmp_path / "again")  # as a Ray Train TorchTrainer
    assert again.status == "finished"
    assert again.trial_id == lora.trial_id
    assert again.scores.eval_loss == pytest.approx(lora.scores.eval_loss, rel=1e-4)


@pytest.mark.parametrize("strategy", ["data", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_workers_train_as_trl_trains_on_one(ray_cluster, tiny_model, questions, tmp_path, strategy):
    """Data-parallel, each with the whole model or a part: the same batch, so the losses of TRL in one process."""
    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft.task import LlmSft

    changes = {"train__micro_batch_size": 2, "train__eval_every": 2, "resources__cpus_per_worker": 1}
    alone = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, **changes, train__engine="trl"))
    bench, expected = LlmSft().load(alone, "cpu"), []
    ((stage, steps),) = alone.method.stages(bench.total_steps())
    bench.attach(stage)
    outcome = bench.train(stage, steps, 0, tmp_path / "one", lambda metrics, step: expected.append(metrics))

    workers = {"resources__num_workers": 2, "resources__strategy": strategy}
    plain = tiny.plain_spec(tiny_model, questions, **changes, **workers)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    (result,) = ray_peft.sweep(tmp_path / "two.yaml", out=tmp_path / "two").results
    assert result.status == "finished", result.error
    lines = (tmp_path / "two" / "trials" / result.trial_id / "metrics.jsonl").read_text().splitlines()
    for name in ("train_loss", "eval_loss"):
        together = [line[name] for line in map(json.loads, lines) if name in line]
        wanted = [metrics[name] for metrics in expected if name in metrics]
        wanted += [bench.eval_loss()] if name == "eval_loss" else []
        assert len(wanted) == (4 if name == "train_loss" else 2)
        assert together == pytest.approx(wanted, rel=1e-5)
    assert result.usage.train_tokens == outcome.tokens


def test_a_worker_that_dies_is_a_failed_row_and_the_others_finish(ray_cluster, tiny_model, questions, tmp_path):
    """What the out-of-memory killer does: SIGKILL in mid-training, of a trial that is not to start again."""
    changes = {"train__steps": 300, "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2, "max_failures": 0}}
    space = write_space(tmp_path / "dies.yaml", tiny_model, questions, METHODS[:2][::-1], **changes)
    killer = threading.Thread(target=_kill_in_training, args=(tmp_path / "out",), daemon=True)
    killer.start()
    outcome = ray_peft.sweep(space, out=tmp_path / "out")
    killer.join(timeout=5)
    status = {result.spec.method.name: result.status for result in outcome.results}
    assert status == {"lora": "failed", "none": "finished"}
    dead = next(result for result in outcome.results if result.status == "failed")
    assert "died" in dead.error
    assert client(outcome.tracking_uri).get_run(dead.mlflow_run_id).info.status == "FAILED"


def _kill_in_training(out: Path) -> None:
    """Kill the process that writes the LoRA trial's log."""
    while not any(out.glob("trials/lora*/metrics.jsonl")):
        time.sleep(0.05)
    (log,) = out.glob("trials/lora*/log.txt")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(log) in {file.path for file in process.open_files()}:
                process.kill()


def test_optuna_proposes_trials_and_goes_on_after_a_stop(ray_cluster, tiny_model, questions, tmp_path):
    method = {"name": "lora", "rank": 4, "lr": {"loguniform": [1.0e-3, 1.0e-1]}}
    plain = tiny.plain_spec(tiny_model, questions, train__steps=1, evaluation__generate=False)
    plain |= {"method": method, "name": "search", "search": {"samples": 2, "algorithm": "optuna"}}
    space = tmp_path / "search.yaml"
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    first = ray_peft.sweep(space, out=tmp_path / "out")
    assert len({result.spec.method.lr for result in first.results}) == 2
    plain["search"]["samples"] = 3
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    more = ray_peft.sweep(space, out=tmp_path / "out")
    assert len(more.results) == 3
    assert {result.trial_id for result in first.results} < {result.trial_id for result in more.results}
    # Longer training is another question: the same folder holds no answer to it, and its report shows its own rows.
    plain["train"]["steps"] = 2
    plain["search"]["samples"] = 1
    plain["method"] = {"choice": [{"name": "lora", "rank": 2}, {"name": "none"}]}
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    (other,) = ray_peft.sweep(space, out=tmp_path / "out").results
    assert other.spec.train.steps == 2
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4
    assert len((tmp_path / "out" / "report.csv").read_text(encoding="utf-8").splitlines()) == 2
    plain["search"]["samples"] = 5  # of which there are two
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    everything = ray_peft.sweep(space, out=tmp_path / "out")
    assert sorted(row.spec.method.name for row in everything.results) == ["lora", "none"]
    assert everything.complete
    (tmp_path / "out" / "search.journal").unlink()
    (tmp_path / "out" / "search.journal").mkdir()
    with pytest.raises(ReportLost, match=r"search\.journal: cannot be used: Is a directory; what finished is kept"):
        ray_peft.sweep(space, out=tmp_path / "out")


def test_a_sweep_goes_on_where_release_0_1_0_left_it(ray_cluster, shared, tmp_path):
    """Its rows count as finished and keep their ids; what is missing joins them, and so does an ensemble of both."""
    space = released.write_inputs(shared / "went_on")
    plain = yaml.safe_load(space.read_text())
    lora = plain["method"]["grid"][1]
    both = {"name": "ensemble", "members": [{"method": {**lora, "rank": 1}}, {"method": {**lora, "rank": 3}}]}
    plain["method"]["grid"].append(both)
    space.write_text(yaml.safe_dump(plain), encoding="utf-8")
    shutil.copytree(released.STORES / "0.1.0", tmp_path / "out")
    old = [row.trial_id for row in read_results(tmp_path / "out")]
    outcome = ray_peft.sweep(space, out=tmp_path / "out")
    assert [row.error for row in outcome.results] == [None] * 6
    ids = [row.trial_id for row in outcome.results]
    assert set(old) < set(ids)
    (ensemble,) = [row for row in outcome.results if row.trial_id not in old and row.members]
    assert set(ensemble.members) == {
        row.trial_id for row in outcome.results if getattr(row.spec.method, "rank", 2) != 2
    }
    assert len({row.provenance.data_key for row in outcome.results}) == 1
    again = ray_peft.sweep(space, out=tmp_path / "out")
    assert [row.mlflow_run_id for row in again.results] == [row.mlflow_run_id for row in outcome.results]


def test_changed_rows_run_again_beside_the_earlier_ones(ray_cluster, tiny_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.QUESTIONS)
    space = write_space(tmp_path / "changed.yaml", tiny_model, rows, [{"name": "none"}])
    (before,) = ray_peft.sweep(space, out=tmp_path / "out").results
    tiny.write_rows(rows, [{**row, "completion": row["completion"] + "!"} for row in tiny.QUESTIONS])
    (after,) = ray_peft.sweep(space, out=tmp_path / "out").results
    assert after.scores.eval_loss != before.scores.eval_loss
    assert {path.name for path in (tmp_path / "out" / "trials").iterdir()} == {before.trial_id, after.trial_id}
    said = "1 trials run again: their rows changed since"
    assert said in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_more_gpus_than_there_are_is_refused_before_anything_starts(ray_cluster, tiny_model, questions, tmp_path):
    space = write_space(
        tmp_path / "gpus.yaml", tiny_model, questions, [{"name": "none"}], resources={"gpus_per_worker": 1}
    )
    with pytest.raises(PlacementError, match="needs 1 GPUs .* there are 0 here"):
        ray_peft.sweep(space, out=tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_tracking_server_that_is_down_is_refused(ray_cluster, tiny_model, questions, tmp_path):
    space = write_space(tmp_path / "down.yaml", tiny_model, questions, [{"name": "none"}])
    with pytest.raises(TrackingError) as caught:
        ray_peft.sweep(space, out=tmp_path / "out", tracking_uri="http://user:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)
