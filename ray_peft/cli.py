"""`ray-peft ...`: parse arguments, call one function, print.

Exit codes: 0 all trials finished; 1 some trial failed, or with `plan --strict` does not fit; 2 bad input, nothing was
started; 3 all trials finished, but the tracking store lacks some of it; 130 interrupted; 141 nobody reads the output
any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_peft import cli_jobs, cli_kept, cli_live
from ray_peft.cli_arguments import (
    add_fresh,
    add_gpu_memory,
    add_settings,
    add_tracking,
    add_trust,
    count,
    names,
    positive,
)
from ray_peft.console import INTERRUPTED, UNSENT, Console, abandon_output, prepare_streams, print_text, short_path
from ray_peft.errors import ClusterLost, RayPeftError, ReportLost
from ray_peft.foundation.processes import end_now
from ray_peft.foundation.quiet import quiet_libraries
from ray_peft.foundation.storage import error_line
from ray_peft.schedule.environment import take_secrets
from ray_peft.schedule.signals import stopping


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    prepare_streams()
    try:
        options = _parser().parse_args(arguments)
        quiet_libraries()
        take_secrets()
        # `ray job stop` and `kill` send SIGTERM: end as after Ctrl-C, with every finished trial kept.
        with stopping(_end_now):
            code: int = options.act(options)
        print_text(flush=True)
    except BrokenPipeError:  # as in `ray-peft plan FILE | head`
        abandon_output()
        return 141
    except (ClusterLost, ReportLost) as error:
        return min(1, _failed(str(error)))
    except RayPeftError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(error_line(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # CPython 3.11 remembers an interrupt inside an exec of text, as dataclasses do, and would end by the signal
        # whatever is returned here; the next eval of text makes it forget.
        eval("0")
        return INTERRUPTED
    return code


def _failed(text: str) -> int:
    """Print an error, one line each, and return its exit code."""
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _end_now() -> None:
    """A second Ctrl-C."""
    with contextlib.suppress(OSError):
        os.write(2, b"\nended at once; what finished is kept, and the same command goes on\n")
    end_now(INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-peft",
        description="Compare fine-tuning methods on the GPUs you have: Ray runs them, MLflow keeps them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("compare", help="find out which method is best for a model and a file of rows")
    command.add_argument("model", help="a folder, or a Hugging Face id")
    command.add_argument("data", help="a file or a folder of rows, or a Hugging Face id; its recipe is recognised")
    command.add_argument("--hours", type=positive, default=2.0, metavar="H", help="time for all of it; default: 2")
    command.add_argument(
        "--methods", type=names, metavar="NAME,...", help="methods to compare; default: full,lora,qlora,galore"
    )
    command.add_argument(
        "--metric",
        choices=("rouge_l", "eval_loss", "reward_accuracy"),
        help="decides the answer; default: rouge_l, of pairs reward_accuracy",
    )
    command.add_argument("--plan-only", action="store_true", help="write the search space and stop")
    command.add_argument(
        "--out", metavar="DIR", help="folder for all of it, or a URL; default: outputs/compare-MODEL-DATA"
    )
    _add_places(command)
    command.set_defaults(act=_compare)

    command = commands.add_parser("sweep", help="run every trial of a search space and compare them")
    command.add_argument("space", help="a YAML file, such as search_spaces/quickstart.yaml")
    _add_common(command, "folder for results, or a URL (s3://bucket/name); default: outputs/<name of the search space>")
    add_fresh(command)
    command.set_defaults(act=_sweep)

    command = commands.add_parser("run", help="run one trial as a Ray Train job")
    command.add_argument("spec", nargs="?", help="a YAML file that holds one trial")
    command.add_argument("--mlflow-run", metavar="RUN_ID", help="run the trial of this MLflow run again")
    add_trust(command)
    _add_common(command, "folder for results, or a URL; default: outputs/<trial id>")
    command.set_defaults(act=_run)

    command = commands.add_parser("plan", help="list and check the trials of a search space, without running them")
    command.add_argument("space", help="a YAML file, such as search_spaces/quickstart.yaml")
    add_settings(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--gpu-memory-gib", type=positive, metavar="GIB", help="memory of a GPU: say which trials fit, and how"
    )
    command.add_argument("--gpus", type=count, default=1, metavar="N", help="GPUs of that memory; default: 1")
    command.add_argument(
        "--cpus", type=count, metavar="N",
        help="CPU cores beside them; default: those of this machine, or what a trial asks for if that is more",
    )  # fmt: skip
    command.add_argument("--gpu", metavar="NAME", help="the GPU's name, such as 'NVIDIA H200', for its own overheads")
    command.add_argument("--strict", action="store_true", help="exit code 1 if a trial does not fit")
    command.set_defaults(act=_plan)

    command = commands.add_parser("data", help="prepare the rows of a search space and report what happened to them")
    command.add_argument("space", help="a YAML file, such as search_spaces/quickstart.yaml")
    add_settings(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="DIR", help="write the prepared rows, examples and the report there")
    command.set_defaults(act=_data)

    cli_kept.add_commands(commands)
    cli_live.add_commands(commands)
    cli_jobs.add_commands(commands)

    command = commands.add_parser("doctor", help="what this machine can do")
    command.set_defaults(act=_doctor)
    return parser


def _add_common(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument("--out", metavar="DIR", help=out)
    _add_places(command)
    add_settings(command)


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, else a local one is started")
    add_tracking(command)
    add_gpu_memory(command)


def _compare(options: argparse.Namespace) -> int:
    from ray_peft.compare.candidates import USUAL
    from ray_peft.compare.command import Request, compare

    request = Request(
        model=options.model,
        data=options.data,
        hours=options.hours,
        methods=options.methods or USUAL,
        metric=options.metric,
        gpu_memory_gib=options.gpu_memory_gib,
    )
    comparison = compare(
        request, out=options.out, address=options.address, tracking_uri=options.tracking_uri, console=Console(),
        plan_only=options.plan_only,
    )  # fmt: skip
    print_text("\n" + "\n".join(comparison.lines))
    if not comparison.finished:
        return 1
    return UNSENT if comparison.unsent else 0


def _sweep(options: argparse.Namespace) -> int:
    from ray_peft.schedule.sweep import sweep

    console = Console()
    outcome = sweep(
        options.space,
        out=options.out,
        address=options.address,
        tracking_uri=options.tracking_uri,
        overrides=options.overrides,
        profile=options.profile,
        fresh=options.fresh,
        gpu_memory_gib=options.gpu_memory_gib,
        console=console,
    )
    console.say(f"\nreport: {short_path(outcome.folder / 'report.html')}, the same as text: report.md")
    console.say(f"MLflow: {_ui_command(options.tracking_uri)}")
    if outcome.interrupted:
        console.say("interrupted; the same command runs the missing trials")
        return INTERRUPTED
    if outcome.finished and outcome.unsent:
        return UNSENT
    return 0 if outcome.complete else 1


def _run(options: argparse.Namespace) -> int:
    from ray_peft.errors import SpecError
    from ray_peft.schedule.experiment import tracking_uri
    from ray_peft.schedule.single import run
    from ray_peft.store import tracking
    from ray_peft.store.consent import check_consent

    if (options.spec is None) == (options.mlflow_run is None):
        raise SpecError("run: give a YAML file, or --mlflow-run RUN_ID")
    spec = options.spec
    if options.mlflow_run is not None:
        if options.overrides or options.profile:
            raise SpecError("run: --set and --profile change a YAML file, but --mlflow-run takes the trial as it was")
        spec = tracking.load_spec(tracking_uri(options.tracking_uri), options.mlflow_run)
        check_consent(spec, options.mlflow_run, trust_remote_code=options.trust_remote_code)
    result = run(
        spec,
        out=options.out,
        address=options.address,
        tracking_uri=options.tracking_uri,
        overrides=options.overrides,
        profile=options.profile,
        gpu_memory_gib=options.gpu_memory_gib,
        console=Console(),
    )
    if result.status == "finished" and result.untracked is not None:
        return UNSENT
    return 0 if result.status == "finished" else 1


def _plan(options: argparse.Namespace) -> int:
    from ray_peft.errors import SpecError
    from ray_peft.report.labels import labels
    from ray_peft.schedule import plan
    from ray_peft.schedule.seconds import predicted_seconds
    from ray_peft.vram.cards import ANY, KNOWN, known

    trials = plan.plan(options.space, options.overrides, options.profile, Console(quiet=options.json))

    gpu = known(options.gpu) if options.gpu else ANY
    if options.gpu and gpu is ANY and options.gpu_memory_gib is None:
        names = ", ".join(card.name for card in KNOWN)
        raise SpecError(f"--gpu {options.gpu}: the known ones are {names}; of another, give --gpu-memory-gib, too")
    memory = options.gpu_memory_gib or (gpu.memory_gib if options.gpu else None)
    decision = None
    if memory is not None:  # a prediction takes seconds where it was not made before
        decision = plan.planned(trials, memory, gpus=options.gpus, gpu_name=options.gpu, cpus=options.cpus)
    seconds = predicted_seconds(decision, options.gpu) if decision is not None else None
    code = 1 if options.strict and decision is not None and not decision.all_fit else 0
    if options.json:
        print_text(json.dumps([plan.plain(trial, decision, seconds) for trial in trials], indent=2))
        return code
    named = labels({trial.trial_id: trial for trial in trials})
    print_text("\n".join(plan.lines(trials, named, decision, seconds)))
    print_text(f"{len(trials)} trials, checked: no weights were loaded")
    return code


def _data(options: argparse.Namespace) -> int:
    from ray_peft import data_report

    reports = data_report.report_data(options.space, options.overrides, options.profile)
    print_text(json.dumps(data_report.plain(reports), indent=2) if options.json else data_report.table(reports))
    if options.out is not None:
        written = data_report.write(reports, Path(options.out))
        for path in written:  # standard output holds JSON alone, where JSON was asked for
            print(f"written: {short_path(path)}", file=sys.stderr if options.json else sys.stdout)
    data_report.raise_if_refused(reports)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from ray_peft.doctor.examination import examine
    from ray_peft.doctor.findings import render

    findings = examine()
    print_text(render(findings))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def _ui_command(uri: str | None) -> str:
    """The command as it must be typed here: inside a virtual environment that is not active, with its path."""
    program = Path(sys.argv[0])
    name = "python -m ray_peft" if program.name == "__main__.py" else short_path(program)
    name = "ray-peft" if shutil.which("ray-peft") else name
    return f"{name} ui --tracking-uri {uri}" if uri and "@" not in uri else f"{name} ui"
