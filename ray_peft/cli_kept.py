"""The commands for what sweeps have left behind: report, sync, clean, export, chat, promote, ui."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ray_peft.cli_arguments import add_tracking, add_trust, count, steps, sweep_folder
from ray_peft.console import UNSENT, Console, print_text, short_path
from ray_peft.foundation.masking import mask


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    command = commands.add_parser("report", help="write a sweep's report again and print its table")
    command.add_argument("sweep", help="the sweep's folder, such as outputs/quickstart, or its URL, which is fetched")
    command.add_argument(
        "--loss-steps", type=steps, metavar="STEP,...",
        help="optimizer steps at which losses are compared, such as 50,1000,3714; default: report.loss_steps of the "
        "search space, else about six over the run",
    )  # fmt: skip
    command.set_defaults(act=_report)

    command = commands.add_parser("sync", help="send what an MLflow server that was away lacks of a sweep")
    command.add_argument("sweep", help="the sweep's folder, such as outputs/quickstart, or its URL")
    command.add_argument("--tracking-uri", help="MLflow store; default: the sweep's own")
    command.set_defaults(act=_sync)

    command = commands.add_parser(
        "clean", help="show, or remove, what is not needed: caches and what kills left behind"
    )
    command.add_argument(
        "sweeps", nargs="*", type=sweep_folder, metavar="DIR", help="sweeps' folders; default: all in outputs"
    )
    command.add_argument("--yes", action="store_true", help="remove it; results, adapters and checkpoints stay")
    command.set_defaults(act=_clean)

    command = commands.add_parser("export", help="write a trial's adapter, merged model or GGUF file")
    command.add_argument("run", metavar="RUN_ID", help="the trial's MLflow run")
    command.add_argument(
        "--format",
        choices=("adapter", "merged", "gguf"),
        default="adapter",
        help="the adapter alone (the default), the base with the adapter merged into it, or that as one GGUF file",
    )
    command.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16", help="of the weights; default: bf16")
    command.add_argument("--out", metavar="DIR", help="a new folder; default: exports/<trial id>-<format>-<dtype>")
    add_tracking(command)
    add_trust(command)
    command.set_defaults(act=_export)

    command = commands.add_parser("chat", help="ask trials questions, and see their answers side by side")
    command.add_argument("trials", nargs="+", metavar="TRIAL", help="a trial's id from the report, or its MLflow run's")
    command.add_argument("--base", action="store_true", help="let the untouched base answer, too")
    command.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="of an answer; default: 256")
    add_tracking(command)
    add_trust(command)
    command.set_defaults(act=_chat)

    command = commands.add_parser("promote", help="register a trial's adapter as a model version with the alias best")
    command.add_argument("trial", help="a trial's id from the report, or the id of its MLflow run")
    command.add_argument("name", help="the registered model's name, such as support-answers")
    add_tracking(command)
    command.set_defaults(act=_promote)

    command = commands.add_parser("ui", help="open the MLflow UI on the results, or a page of a running sweep")
    command.add_argument(
        "sweep",
        nargs="?",
        type=sweep_folder,
        help="with --live, the sweep's folder; default: the one in outputs that was heard of last",
    )
    command.add_argument(
        "--live", action="store_true",
        help="a page of this machine alone: losses as they come, who runs on which GPU, memory predicted and used",
    )  # fmt: skip
    add_tracking(command)
    command.add_argument("--host", help="address to listen on; default: this machine alone")
    command.add_argument("--port", type=int, help="default: 5000, with --live 5001")
    command.set_defaults(act=_ui)


def _report(options: argparse.Namespace) -> int:
    from ray_peft.errors import DataError
    from ray_peft.report.files import write_report
    from ray_peft.report.plain import console_table
    from ray_peft.schedule.experiment import outputs_folder
    from ray_peft.store.places import fetched_folder
    from ray_peft.store.remote import is_url
    from ray_peft.store.results_file import read_results

    folder = fetched_folder(options.sweep, outputs_folder()) if is_url(options.sweep) else Path(options.sweep)
    finished = (folder / "results.jsonl").is_file()
    if not finished and not (folder / "sweep.json").is_file():
        raise DataError(f"{folder}: holds no results.jsonl; give the folder of a sweep, such as outputs/quickstart")
    written = write_report(folder, loss_steps=options.loss_steps)
    print_text(console_table(read_results(folder) if finished else []))
    print_text("\n" + "\n".join(f"written: {short_path(path)}" for path in written))
    return 0


def _sync(options: argparse.Namespace) -> int:
    from ray_peft.schedule.experiment import outputs_folder
    from ray_peft.schedule.sync import sync
    from ray_peft.store.places import working_folder

    with working_folder(options.sweep, outputs_folder(), Console()) as folder:
        lacking = sync(folder, options.tracking_uri, Console())
    if not lacking:
        print_text("the tracking store has all of this sweep")
    return UNSENT if lacking else 0


def _clean(options: argparse.Namespace) -> int:
    from ray_peft import clean
    from ray_peft.schedule.experiment import outputs_folder

    sweeps = options.sweeps or clean.sweeps_in(outputs_folder())
    clean.check_sweeps(sweeps)
    removable = clean.cached()
    with contextlib.ExitStack() as holding:
        for folder in sweeps:
            if holding.enter_context(clean.unused(folder)):
                removable += clean.left_in(folder)
            else:
                print_text(f"{short_path(folder)} is in use, and stays as it is")
        for item in removable:
            print_text(f"{item.num_bytes / 2**20:9.1f} MiB  {short_path(item.path)}")
            if options.yes:
                clean.remove(item)
    total = f"{sum(item.num_bytes for item in removable) / 2**20:.1f} MiB"
    print_text(f"{total} removed" if options.yes else f"{total} can be removed: ray-peft clean --yes")
    return 0


_DTYPES: dict[str, Literal["bfloat16", "float16", "float32"]] = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"
}  # fmt: skip


def _export(options: argparse.Namespace) -> int:
    from ray_peft.export import export
    from ray_peft.schedule.experiment import tracking_uri

    uri = tracking_uri(options.tracking_uri)
    exported = export(
        options.run, form=options.format, dtype=_DTYPES[options.dtype], out=options.out, tracking_uri=uri,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    size = f"{exported.num_bytes / 2**20:.1f} MiB"
    print_text(f"{exported.folder}: {exported.format} of {exported.trial_id} in {exported.dtype}, {size}")
    print_text(f"held-out loss {exported.eval_loss_before:.4f} as saved, {exported.eval_loss_after:.4f} as exported")
    return 0


def _chat(options: argparse.Namespace) -> int:
    from ray_peft.chat import NEW, QUIT, chat
    from ray_peft.schedule.experiment import tracking_uri

    uri = tracking_uri(options.tracking_uri)
    if sys.stdin.isatty():
        print_text(f"a question, {NEW} for new conversations, {QUIT} or Ctrl-D to end; models are loaded first")
    width = shutil.get_terminal_size((100, 24)).columns
    chat(
        options.trials, _typed(), lambda text: print_text(text, flush=True), tracking_uri=uri, base=options.base,
        max_new_tokens=options.max_new_tokens, width=width, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    return 0


def _typed() -> Iterator[str]:
    """What is typed, or what a pipe holds, line by line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - lets the arrow keys edit what is typed
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def _promote(options: argparse.Namespace) -> int:
    from ray_peft.schedule.experiment import tracking_uri
    from ray_peft.store import tracking

    uri = tracking_uri(options.tracking_uri)
    promoted = tracking.promote(uri, options.trial, options.name)
    print_text(f"{promoted.trial_id}: version {promoted.version} of {promoted.name}, {promoted.uri}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    from ray_peft.errors import SpecError
    from ray_peft.foundation.processes import end_group
    from ray_peft.schedule.experiment import outputs_folder, tracking_uri
    from ray_peft.store import tracking

    if options.live:
        return _live(options)
    if options.sweep is not None:
        raise SpecError("ui: MLflow shows all sweeps; for a page of one that runs, add --live")
    uri = tracking_uri(options.tracking_uri)
    if tracking.is_server(uri):
        print_text(f"MLflow runs at {mask(uri)}")
        return 0
    host, port = options.host or "127.0.0.1", options.port or 5000
    command = tracking.ui_command(uri, outputs_folder() / "mlartifacts", host, port)
    _check_port(host, port)
    print_text(f"MLflow UI: http://{host}:{port}  (store {mask(uri)}; Ctrl-C ends it)", flush=True)
    # A group of its own: the command starts a server below it, and both must end.
    server = subprocess.Popen(command, env=tracking.ui_environment(), start_new_session=True)
    try:
        return server.wait() or 1  # it ended by itself
    except KeyboardInterrupt:
        return 0
    finally:
        end_group(server)


def _live(options: argparse.Namespace) -> int:
    """Serve the page of a running sweep until Ctrl-C."""
    from ray_peft.errors import DataError, SpecError
    from ray_peft.live.server import HOST, LiveServer
    from ray_peft.schedule.experiment import outputs_folder
    from ray_peft.store.progress import newest

    if options.host not in (None, HOST, "localhost") or options.tracking_uri:
        raise SpecError("ui: --live listens on this machine alone and reads the sweep's folder, without --tracking-uri")
    sweep = options.sweep or newest(outputs_folder())
    if sweep is None:
        raise DataError(f"{outputs_folder()}: holds no sweep yet; start one, or give the folder of one")
    port = options.port if options.port is not None else 5001
    _check_port(HOST, port)
    with LiveServer(sweep, port) as server, contextlib.suppress(KeyboardInterrupt):
        print_text(f"{short_path(sweep)}: {server.address}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


def _check_port(host: str, port: int) -> None:
    """Raise a TrackingError if nothing can listen there."""
    from ray_peft.errors import TrackingError

    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise TrackingError(f"ui: cannot listen on {host}:{port} ({error}); choose another --port or --host") from None
