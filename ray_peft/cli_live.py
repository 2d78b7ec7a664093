"""The commands for a running sweep: watch shows it, ctl changes it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.cli_arguments import sweep_folder
from ray_peft.foundation.durations import short_time

if TYPE_CHECKING:
    from ray_peft.store.progress import Progress, TrialProgress

REFRESH_S = 2.0
_TARGETS = {
    "list": "", "show": "a trial's id", "cancel": "a trial's id", "requeue": "a trial's id", "clone": "a trial's id",
    "add": "a YAML file of further trials", "pause": "", "resume": "",
}  # fmt: skip
"""What each action of `ctl` is about."""
_HEADS = ("trial", "method", "state", "step", "loss", "tokens/s", "memory GiB", "left")


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    command = commands.add_parser("watch", help="show a running sweep: a line a trial, until the sweep ends")
    command.add_argument("sweep", type=sweep_folder, help="the sweep's folder, such as outputs/quickstart")
    command.add_argument("--once", action="store_true", help="show it once and end")
    command.add_argument("--json", action="store_true", help="print JSON, one line for each look")
    command.set_defaults(act=_watch)

    command = commands.add_parser(
        "ctl", help="change a running sweep: cancel, requeue, clone or add trials, pause and resume it"
    )
    command.add_argument("sweep", type=sweep_folder, help="the sweep's folder, such as outputs/quickstart")
    command.add_argument("action", choices=tuple(_TARGETS))
    command.add_argument("target", nargs="?", help="a trial's id; for add, a YAML file of further trials")
    command.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="for clone and add: replace a setting, such as --set method.lr=1.0e-4; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--warm", action="store_true",
        help="for clone: start from the trial's last checkpoint, or what it saved; compared with no other trial",
    )  # fmt: skip
    command.add_argument("--profile", metavar="NAME", help="for add: a profile of the file")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(act=_ctl)


def _watch(options: argparse.Namespace) -> int:
    from ray_peft.store.progress import Reader

    reader = Reader(options.sweep)
    in_place = not options.json and not options.once and sys.stdout.isatty()
    if in_place and os.name == "nt":
        os.system("")  # lets the console understand the codes below
    height, shown = 0, ""
    while True:
        progress = reader.read()
        text = json.dumps(progress.plain()) if options.json else "\n".join(table(progress))
        if in_place:
            rows = os.get_terminal_size().lines - 1
            text = "\n".join(text.split("\n")[:rows])
            print((f"\x1b[{height}F\x1b[J" if height else "") + text, flush=True)
            height = text.count("\n") + 1
        elif text != shown:
            print(text, flush=True)
        shown = text
        if options.once or progress.ended:
            return 0
        time.sleep(REFRESH_S)


def _ctl(options: argparse.Namespace) -> int:
    from ray_peft.store.progress import Reader, cancel, unknown_trial
    from ray_peft.store.requests import Answer, ask

    folder, target = options.sweep, options.target
    _check_arguments(options)
    if options.action in ("list", "show"):
        progress = Reader(folder).read()
        if options.action == "show":
            progress = replace(progress, trials=[trial for trial in progress.trials if trial.trial_id == target])
            if not progress.trials:
                raise unknown_trial(folder, target)
        print(json.dumps(progress.plain(), indent=2) if options.json else "\n".join(table(progress)))
        return 0
    if options.action == "cancel":
        cancel(folder, target)
        answer = Answer(f"{target}: ends at the next step that it logs; `requeue` runs it again", trials=(target,))
    elif options.action == "add":
        answer = ask(folder, "add", _space(options))
    else:
        answer = ask(folder, options.action, {"trial": target, "set": options.overrides, "warm": options.warm})
    outcome = {"action": options.action, "trials": answer.trials, "text": answer.text}
    print(json.dumps(outcome) if options.json else ascii_only(answer.text))
    return 0


def _check_arguments(options: argparse.Namespace) -> None:
    """Refuse arguments that the action does not take, and miss none that it needs."""
    from ray_peft.errors import SpecError

    action, needed = options.action, _TARGETS[options.action]
    if (options.target is not None) != bool(needed):
        raise SpecError(f"ctl: {action} takes {needed or 'neither a trial nor a file'}")
    if action == "clone" and not options.overrides and not options.warm:
        raise SpecError("ctl: clone needs --set KEY=VALUE; the same settings again are the same trial: requeue runs it")
    takers = {"set": ("clone", "add"), "profile": ("add",), "warm": ("clone",)}
    settings = {"set": options.overrides, "profile": options.profile, "warm": options.warm}
    for name, value in settings.items():
        if value and action not in takers[name]:
            raise SpecError(f"ctl: {action} takes no --{name}")


def _space(options: argparse.Namespace) -> dict[str, Any]:
    """A search space file as a request: the driver may run where the file is not."""
    from ray_peft.space.yaml_text import read

    path = Path(options.target)
    return {"source": str(path), "text": read(path), "set": options.overrides, "profile": options.profile}


def table(progress: Progress) -> list[str]:
    """Lines for a terminal: ASCII alone, the running trials first, the waiting ones last."""
    from ray_peft.store.progress import has_row

    running = [trial for trial in progress.trials if trial.state != "waiting" and not has_row(trial)]
    ended = [trial for trial in progress.trials if has_row(trial)]
    waiting = [trial for trial in progress.trials if trial.state == "waiting"]
    lines = aligned([_HEADS, *(_cells(trial) for trial in (*running, *ended))]) if running or ended else []
    finished = sum(trial.state == "finished" for trial in ended)
    driver = {
        "running": "",
        "paused": "; paused, `ray-peft ctl` with resume lets it go on",
        "ended": "; the sweep has ended",
        "silent": "; its driver is silent: it was killed, or this folder is cut off from it",
        "unknown": "",
    }[progress.driver]
    left = "not run" if progress.driver in ("ended", "silent") else "waiting"
    counts = f"{len(progress.trials)} trials: {len(running)} running, {finished} finished"
    counts += f", {len(ended) - finished} not finished" if len(ended) > finished else ""
    return [f"{ascii_only(progress.name)}: {counts}, {len(waiting)} {left}{driver}", *lines]


def _cells(trial: TrialProgress) -> tuple[str, ...]:
    step = f"{trial.step}/{trial.steps}" if trial.steps and trial.step != trial.steps else str(trial.step or "")
    memory = f"{trial.memory_gib:.1f}" if trial.memory_gib is not None else ""
    memory += f" of {trial.room_gib:.1f}" if memory and trial.room_gib is not None else ""
    return (
        trial.trial_id,
        ascii_only(trial.method),
        trial.state,
        step,
        f"{trial.loss:.4f}" if trial.loss is not None else "",
        f"{trial.tokens_per_s:.0f}" if trial.tokens_per_s is not None else "",
        memory,
        short_time(trial.left_s) if trial.left_s is not None else "",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def ascii_only(text: str) -> str:
    """Text that any console can print and that takes as many columns as it has characters."""
    return text.encode("ascii", "backslashreplace").decode()
