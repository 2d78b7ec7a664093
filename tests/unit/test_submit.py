"""What goes with a job, and what of it may be seen."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import tiny
import yaml

from ray_peft import cli
from ray_peft.errors import JobError, PlacementError, SpecError
from ray_peft.schedule import jobs, packed_results
from ray_peft.schedule import package as packages
from ray_peft.schedule.autoscaler import bundles
from ray_peft.schedule.decide import Node
from ray_peft.schedule.environment import Environment, environment, for_workers, take_secrets
from ray_peft.schedule.jobs import Job, Submission, dashboard_address, unpacked
from ray_peft.space.read import load
from ray_peft.spec import TrialSpec

PLAIN = {"RAY_PEFT_MODEL": "/m", "HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": "/t", "MLFLOW_TRACKING_URI": "http://h:5000"}
SECRET = {
    "HF_TOKEN": "hf_x",
    "MLFLOW_TRACKING_PASSWORD": "p",
    "RAY_PEFT_STORE": "postgresql://u:p@h/d",
    "MLFLOW_S3_KEY": "k",
}


def test_secrets_are_told_apart_by_name_and_value():
    variables = {**PLAIN, **SECRET, "PATH": "/bin", "AWS_SECRET": "s", "RAY_PEFT_SECRETS_FILE": "f"}
    assert environment(variables) == Environment(PLAIN, SECRET)
    assert "hf_x" not in repr(environment(variables))


def test_workers_get_what_the_job_does_not_set_by_itself(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("RAY_PEFT_", "HF_", "MLFLOW_")):
            monkeypatch.delenv(name)
    for name, value in {"RAY_PEFT_MODEL": "/m", "HF_HOME": "/h", "HF_TOKEN": "hf_x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"HF_HOME": "/h"}}}))
    settings = for_workers({"TOKENIZERS_PARALLELISM": "false"})
    assert settings["env_vars"] == {"RAY_PEFT_MODEL": "/m", "TOKENIZERS_PARALLELISM": "false"}
    monkeypatch.delenv("HF_TOKEN")
    settings["worker_process_setup_hook"]()
    assert os.environ["HF_TOKEN"] == "hf_x"


def test_a_jobs_driver_takes_its_secrets_from_the_package(monkeypatch, tmp_path):
    (tmp_path / "space.yaml").write_text("x")
    with packages.package(tmp_path / "space.yaml", [], {"HF_TOKEN": "hf_sent"}) as folder:
        assert (folder / packages.SECRETS).stat().st_mode & 0o077 == 0
        assert (folder / "ray_peft" / "cli.py").is_file()
        assert not [*folder.rglob("__pycache__")]
        monkeypatch.chdir(folder)
        monkeypatch.setenv("RAY_PEFT_SECRETS_FILE", packages.SECRETS)
        monkeypatch.setenv("HF_TOKEN", "of the machine")
        take_secrets()
        assert os.environ["HF_TOKEN"] == "hf_sent"
        monkeypatch.chdir(tmp_path)
    assert not folder.exists()
    monkeypatch.setenv("RAY_PEFT_SECRETS_FILE", packages.SECRETS)
    with pytest.raises(PlacementError, match="submit the job again"):
        take_secrets()


def test_files_named_from_here_go_along_and_absolute_ones_do_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for data, sent in (("rows.jsonl", ["model", "rows.jsonl"]), (str(tmp_path / "rows.jsonl"), ["model"])):
        text = yaml.safe_dump(tiny.plain_spec("./model", data))
        Path("space.yaml").write_text(text)
        assert list(map(str, packages.named_files(load("space.yaml").trials, [text]))) == sent


def test_what_is_too_large_to_send_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "MOST_MIB", 0.001)
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text("x")
    Path("rows.jsonl").write_text("x" * 2000)
    with (
        pytest.raises(SpecError, match=r"more than the 0.001 MiB .* rows.jsonl; copy them to storage"),
        packages.package(Path("space.yaml"), [Path("rows.jsonl")], {}),
    ):
        pass


@pytest.mark.parametrize(
    ("out", "outputs", "folder"),
    [
        ("/mnt/my runs", None, "'/mnt/my runs'"),
        (None, "/mnt/outputs", "/mnt/outputs/small"),
        (None, None, '"${RAY_PEFT_OUTPUTS:?set it'),
    ],
)
def test_where_a_job_writes(out, outputs, folder):
    plain = {"RAY_PEFT_OUTPUTS": outputs} if outputs else {}
    assert Submission("small", (), out, "python", Environment(plain, {})).shell_out.startswith(folder)


def test_a_jobs_folder_is_shown_as_people_write_it():
    outs = [Submission("my runs", (), out, "python", Environment({}, {})).shell_out for out in ("/mnt/a b", None)]
    jobs = [Job("j", "RUNNING", "my runs", out, None, None, None, "") for out in outs]
    assert [job.folder for job in jobs] == ["/mnt/a b", "$RAY_PEFT_OUTPUTS/my runs"]


def test_results_that_are_not_on_the_cluster_are_not_fetched_from_it(monkeypatch, capsys):
    class Cluster:
        def info(self, job_id: str) -> Job:
            return Job(job_id, "SUCCEEDED", "small", "s3://bucket/small", None, None, None, "")

    monkeypatch.setattr(jobs, "Jobs", lambda address: Cluster())
    assert cli.main(["fetch", "small-1"]) == 2
    says = "error: small-1: its results are not on the cluster: ray-peft report s3://bucket/small"
    assert capsys.readouterr().err.strip() == says


@pytest.mark.parametrize(
    ("address", "variables", "url"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("head:8265", {}, "http://head:8265"),
        ("https://head/", {"RAY_ADDRESS": "http://other:1"}, "https://head"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
    ],
)
def test_the_dashboards_address(address, variables, url):
    assert dashboard_address(address, variables) == url


def test_an_address_that_is_none_of_a_dashboard_is_refused():
    with pytest.raises(PlacementError, match="give the dashboard's address"):
        dashboard_address("ray://head:10001", {})


def test_results_come_back_whole_or_not_at_all(tmp_path, capsys):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.svg").write_text("<svg/>")
    (tmp_path / "results.jsonl").write_text("{}\n" * 1000)
    (tmp_path / "trials").mkdir()
    packed_results.main(tmp_path)
    log = f"Runtime env is setting up.\n{capsys.readouterr().out}"
    results: tarfile.TarFile = unpacked(log)
    assert sorted(results.getnames()) == ["plots", "plots/a.svg", "results.jsonl"]
    file = results.extractfile("plots/a.svg")
    assert isinstance(file, io.BufferedReader)
    assert file.read() == b"<svg/>"
    with pytest.raises(JobError, match="cut off"):
        unpacked(log[:-40])
    packed_results.main(tmp_path / "nothing")
    assert capsys.readouterr().out.strip() == packed_results.NOTHING


def test_a_secret_in_a_jobs_command_is_refused(tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"tracking": {"uri": "http://h:5000"}, **tiny.plain_spec("m/m", "d/d")}))
    code = cli.main(["submit", str(space), "--set", "tracking.uri=http://user:word@h", "--address", "http://h:1"])
    shown = capsys.readouterr().err
    assert code == 2
    assert "--set: holds a secret" in shown
    assert "user:word" not in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu-memory-gib", "much"], "--gpu-memory-gib: must be a number above 0 (found 'much')"),
        (["--gpu-memory-gib", "-1"], "--gpu-memory-gib: must be a number above 0 (found '-1')"),
        (["--tracking-uri", "postgresql://h/d"], "neither sqlite:///FILE nor http(s)://HOST:PORT"),
        (["--tracking-uri", "sqlite:///mlflow.db"], "sqlite:///mlflow.db: must be an absolute file on the cluster"),
        (["--set", "tracking.uri=ftp://h"], "'ftp://h' is neither"),
        (["--out", "outputs"], "--out outputs: must be an absolute folder on the cluster, or a URL"),
        (["--out", "sftp://me:word@host/s"], "--out sftp://***@host/s: holds a secret; give the cluster its"),
        (["--profile", "small"], "small"),
        (["--set", "train.steps=none"], "train.steps"),
        (["--env", "a b"], "--env a b: give NAME=VALUE"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_sent(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(jobs, "Jobs", lambda address: pytest.fail("the cluster is asked"))
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(tiny.plain_spec("m/m", "d/d")))
    try:
        code = cli.main(["submit", str(space), *options])
    except SystemExit as ended:  # of argparse
        code = int(ended.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err


class Taken(Exception):
    """A submission, in place of a cluster that runs it."""


@pytest.mark.parametrize("uri", [None, "http://own:5000"])
def test_options_reach_the_job(tmp_path, monkeypatch, uri):
    """The store of the command line wins over the file's, also where it holds a secret that no command may show."""

    class Cluster:
        address = "http://h:8265"

        def submit(self, submission: Submission, folder: Path) -> str:
            raise Taken(submission)

    monkeypatch.setattr(jobs, "Jobs", lambda address: Cluster())
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({**tiny.plain_spec("m/m", "d/d"), "tracking": {"uri": uri}}))
    store = "http://user:word@h:5000"
    with pytest.raises(Taken) as taken:
        cli.main(["submit", str(space), "--gpu-memory-gib", "12.50", "--fresh", "--tracking-uri", store])
    (submission,) = taken.value.args
    instead = ["--set", "tracking.uri=null"] if uri else []
    assert submission.arguments == ("space.yaml", "--fresh", "--gpu-memory-gib=12.5", *instead)
    assert submission.environment.secret["MLFLOW_TRACKING_URI"] == store


@pytest.mark.parametrize(
    ("nodes", "resources", "wanted"),
    [
        ([], {}, [{"CPU": 1.0, "GPU": 1.0}]),
        ([], {"gpus_per_worker": 0, "cpus_per_worker": 4}, [{"CPU": 4.0}]),
        ([Node(2, 0)], {}, []),
        ([Node(2, 0)], {"gpus_per_worker": 1}, [{"CPU": 1.0, "GPU": 1.0}]),
        ([Node(32, 8)], {"num_workers": 9}, [{"CPU": 1.0, "GPU": 1.0}] * 9),
    ],
)
def test_what_is_asked_of_the_autoscaler(nodes, resources, wanted):
    plain = [tiny.plain_spec("m/m", "d/d", train__batch_size=36, resources=resources)]
    plain += [tiny.plain_spec("m/m", "d/d", resources={"gpus_per_worker": 0, "cpus_per_worker": 1}, seed=2)]
    assert bundles(list(map(TrialSpec.from_plain, plain)), nodes) == wanted
