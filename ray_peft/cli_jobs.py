"""The commands for a distant cluster: submit, jobs, stop, fetch."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.cli_arguments import add_fresh, add_gpu_memory, add_settings
from ray_peft.console import INTERRUPTED
from ray_peft.foundation.durations import short_time
from ray_peft.foundation.masking import mask, mask_address
from ray_peft.store.remote import is_url

if TYPE_CHECKING:
    from ray_peft.schedule.environment import Environment
    from ray_peft.schedule.jobs import Job, Jobs

_OF_THIS_MACHINE = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH")
"""Variables that name folders of the user's own; `--env` sends them all the same."""


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    command = commands.add_parser("submit", help="run a sweep on a cluster, which needs this machine no more")
    command.add_argument("space", help="a YAML file; files that it names from the current folder are sent along")
    _add_address(command)
    command.add_argument(
        "--out", metavar="DIR",
        help="absolute folder on the cluster, or a URL; default: NAME in the cluster's RAY_PEFT_OUTPUTS",
    )  # fmt: skip
    command.add_argument("--tracking-uri", help="MLflow store; default: MLFLOW_TRACKING_URI of here, else of there")
    add_fresh(command)
    add_gpu_memory(command)
    command.add_argument("--follow", action="store_true", help="show the job's log until it ends")
    command.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="a variable for the job besides RAY_PEFT_*, HF_* and MLFLOW_*; NAME= leaves one out; may be repeated",
    )  # fmt: skip
    add_settings(command)
    command.set_defaults(act=_submit)

    command = commands.add_parser("jobs", help="list the sweeps that were submitted to a cluster")
    _add_address(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(act=_jobs)

    command = commands.add_parser("stop", help="end a submitted sweep as Ctrl-C would: finished trials are kept")
    command.add_argument("job", help="its id, as `ray-peft jobs` lists it")
    _add_address(command)
    command.set_defaults(act=_stop)

    command = commands.add_parser("fetch", help="bring a submitted sweep's report and results to this machine")
    command.add_argument("job", help="its id, as `ray-peft jobs` lists it")
    _add_address(command)
    command.add_argument(
        "--to", metavar="DIR", help="default: outputs/<job>; nothing is copied where this machine sees the job's folder"
    )
    command.set_defaults(act=_fetch)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", metavar="URL",
        help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265",
    )  # fmt: skip
    command.add_argument("--python", default="python", metavar="PATH", help=argparse.SUPPRESS)


def _submit(options: argparse.Namespace) -> int:
    from ray_peft.errors import SpecError
    from ray_peft.schedule.jobs import Jobs, Submission
    from ray_peft.schedule.package import named_files, package
    from ray_peft.space import read, yaml_text

    space = Path(options.space)
    _check_out(options.out)
    checked = read.load(space, options.overrides, options.profile)
    variables = _variables(options.env)
    texts = [yaml_text.read(space), *options.overrides, *variables.plain.values()]
    files = named_files(checked.trials, texts)
    arguments = [space.name]
    arguments += ["--fresh"] if options.fresh else []
    arguments += [f"--gpu-memory-gib={options.gpu_memory_gib:.15g}"] if options.gpu_memory_gib else []
    arguments += [f"--profile={options.profile}"] if options.profile else []
    for override in options.overrides:
        if mask(override) != override:  # a job's command is shown to everybody on the cluster
            raise SpecError("--set: holds a secret; put it into a RAY_PEFT_ variable and name that in the search space")
        arguments += ["--set", override]
    if options.tracking_uri is not None:
        variables = _with(variables, "MLFLOW_TRACKING_URI", options.tracking_uri)
        # The file's own would win over the variable; the option may hold a secret, which no command may show.
        arguments += ["--set", "tracking.uri=null"] if checked.tracking.uri is not None else []
    _check_store(options.tracking_uri or checked.tracking.uri or variables.value("MLFLOW_TRACKING_URI"))
    jobs = Jobs(options.address)
    submission = Submission(checked.name, tuple(arguments), options.out, options.python, variables)
    with package(space, files, variables.secret) as folder:
        job_id = jobs.submit(submission, folder)
    print(f"{job_id}: {len(checked.trials)} trials of {checked.name}, submitted to {jobs.address}")
    if files:
        print(f"sent along: {', '.join(map(str, files))}")
    names = [*variables.plain, *(f"{name} (secret, in a file)" for name in variables.secret)]
    print(f"variables: {', '.join(names) or 'none'}", flush=True)
    if options.follow:
        return _follow(jobs, job_id)
    print(f"ray-peft jobs | stop {job_id} | fetch {job_id}, each with --address {jobs.address}")
    return 0


def _check_out(out: str | None) -> None:
    """Refuse a place that the job's end would take away, or that holds a secret.

    Raises:
        SpecError: it is neither an absolute folder nor a URL, or a URL with a password.
    """
    from ray_peft.errors import SpecError

    if out is None or out.startswith("/"):
        return
    if not is_url(out):
        raise SpecError(
            f"--out {out}: must be an absolute folder on the cluster, or a URL: a job's own folder is removed"
        )
    if mask_address(out) != out:  # a job's command is shown to everybody on the cluster
        raise SpecError(f"--out {mask_address(out)}: holds a secret; give the cluster its credentials by --env")


def _check_store(uri: str | None) -> None:
    """Refuse a tracking store that the job could not use; whether a server answers is seen from the cluster alone.

    Raises:
        RayPeftError: it is none, or a file in the job's own folder.
    """
    from ray_peft.errors import SpecError
    from ray_peft.store import tracking

    if uri is None or tracking.is_server(uri):
        return
    tracking.sqlite_file(uri)
    if not uri.removeprefix("sqlite:///").startswith(("/", "~")):
        raise SpecError(
            f"tracking store {uri}: must be an absolute file on the cluster, such as sqlite:////mnt/outputs/mlflow.db: "
            "a job's own folder is removed"
        )


def _variables(chosen: list[str]) -> Environment:
    """What goes with a job: the variables of this process that trials need, and those that the user names."""
    from ray_peft.errors import SpecError
    from ray_peft.schedule.environment import environment, split

    own = environment(os.environ)
    variables = {name: value for name, value in {**own.plain, **own.secret}.items() if name not in _OF_THIS_MACHINE}
    for setting in chosen:
        name, equals, value = setting.partition("=")
        if not name.isidentifier() or not (equals or name in os.environ):
            raise SpecError(f"--env {name}: give NAME=VALUE, or the name of a variable that is set here")
        variables[name] = value if equals else os.environ[name]
    return split({name: value for name, value in variables.items() if value})


def _with(variables: Environment, name: str, value: str) -> Environment:
    from ray_peft.schedule.environment import split

    return split({**variables.plain, **variables.secret, name: value})


def _follow(jobs: Jobs, job_id: str) -> int:
    try:
        job = jobs.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nno longer followed; the job goes on. To end it: ray-peft stop {job_id} --address {jobs.address}")
        return INTERRUPTED
    print(_line(job))
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        return INTERRUPTED
    if job.exit_code is None:
        print(job.message)
    return job.exit_code or 1


def _jobs(options: argparse.Namespace) -> int:
    from ray_peft.schedule.jobs import Jobs

    jobs = Jobs(options.address)
    submitted = jobs.list()
    if options.json:
        print(json.dumps([asdict(job) for job in submitted], indent=2))
        return 0
    for job in submitted:
        print(_line(job))
    if not submitted:
        print(f"no sweep was submitted to {jobs.address}")
    return 0


def _line(job: Job) -> str:
    times = ""
    if job.began is not None:
        times = f", {short_time((job.ended or time.time()) - job.began)}"
    code = f" (exit code {job.exit_code})" if job.exit_code else ""
    return f"{job.job_id}  {job.state}{code}{times}  {job.folder}"


def _stop(options: argparse.Namespace) -> int:
    from ray_peft.schedule.jobs import ENDED, Jobs

    jobs = Jobs(options.address)
    before = jobs.info(options.job)
    if before.state in ENDED:
        print(f"{_line(before)}: it had ended before")
        return 0
    print(f"{options.job}: its trials end at their next step, with their checkpoints", flush=True)
    job = jobs.stop(options.job)
    print(_line(job))
    return 0 if job.state in ENDED else 1


def _fetch(options: argparse.Namespace) -> int:
    from ray_peft.errors import SpecError, StorageError
    from ray_peft.schedule.experiment import outputs_folder
    from ray_peft.schedule.jobs import Jobs

    jobs = Jobs(options.address)
    job = jobs.info(options.job)
    if is_url(job.folder):
        raise SpecError(f"{job.job_id}: its results are not on the cluster: ray-peft report {job.folder}")
    with jobs.fetch(options.job, options.python) as results:
        record = results.extractfile("sweep.json") if "sweep.json" in results.getnames() else None
        content = record.read() if record is not None else b""
        shared = Path(os.path.expandvars(job.folder))
        if (
            options.to is None
            and content
            and (shared / "sweep.json").is_file()
            and (shared / "sweep.json").read_bytes() == content
        ):
            print(f"{shared}: this machine sees the job's own folder, so nothing is copied")
            return 0
        target = Path(options.to) if options.to else outputs_folder() / job.job_id
        try:
            target.mkdir(parents=True, exist_ok=True)
            results.extractall(target, filter="data")
        except OSError as error:
            raise StorageError(f"cannot write into {target}: {error.strerror}") from None
    print(f"written: {target}; trained weights stay on the cluster, in {job.folder}")
    return 0
