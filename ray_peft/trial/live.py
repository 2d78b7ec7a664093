"""What a running trial says of itself in `live.json` of its folder, every few seconds; gone once it has a row."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray_peft.errors import TrialCancelled, TrialStopped
from ray_peft.foundation.measured import to_json
from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.trial.provenance import gpu_number

LIVE_FILE = "live.json"
CANCEL_FILE = "cancel"
"""A file of this name in a trial's folder asks the trial to end."""
STOP_FILE = "stop_early"
"""And a file of this name holds the reason why a search ends the trial before its last step."""
BEAT_S = 2.0
"""Between two writings."""
POINTS = 8
"""Logged points from which the speed is taken: the last ones, since the first steps are slow."""


class Live:
    """One trial's file."""

    def __init__(self, folder: Path, spec: TrialSpec, device: str, room_gib: float | None = None) -> None:
        """Begin to write.

        Args:
            folder: the trial's own.
            spec: the trial.
            device: "cpu" or "cuda:N".
            room_gib: what it may take of its GPU; None is all of it.
        """
        self.steps: int | None = None
        """Optimizer steps of the whole trial, once they are known."""
        self.predicted_gib: float | None = None
        """The peak of its GPU's memory as predicted, once that is known."""
        self.phase: Callable[[], str] = str
        """Says what the trial does: load, train, save, evaluate."""
        self._path, self._cancel, self._stop = folder / LIVE_FILE, folder / CANCEL_FILE, folder / STOP_FILE
        self._device, self._room_gib = device, room_gib
        self._fixed = {
            "trial_id": spec.trial_id, "method": spec.method.name, "device": device,
            "gpu": gpu_number(device), "host": platform.node(), "pid": os.getpid(), "began": time.time(),
        }  # fmt: skip
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._points: deque[tuple[float, int, int]] = deque(maxlen=POINTS)
        """Seconds, step and tokens so far."""
        self._closed = False
        _BEATS.add(self)

    def check(self) -> None:
        """Raise a TrialCancelled if the user wants the trial to end, and a TrialStopped if a search does."""
        if self._cancel.exists():
            raise TrialCancelled("cancelled by `ray-peft ctl`")
        if self.steps is not None and self._step < self.steps and self._stop.exists():  # else it has ended by itself
            raise TrialStopped(self._stop.read_text(encoding="utf-8"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics of an optimizer step."""
        self._step = step
        self._metrics = {**self._metrics, **metrics}  # never changed in place: the thread that writes may read it

    def count(self, step: int, tokens: int) -> None:
        """Take how many tokens were trained on up to a step."""
        if self._points and step <= self._points[-1][1]:  # another stage counts from 0
            self._points.clear()
        self._points.append((time.monotonic(), step, tokens))

    def close(self) -> None:
        """The trial has a row."""
        self._closed, self.phase = True, str
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Write the file. One that cannot be written is left out: the trial itself will tell of a full disk."""
        if self._closed:
            return
        text = json.dumps(to_json(self.plain()))
        temporary = self._path.with_name(f".{LIVE_FILE}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(text, encoding="utf-8")  # not flushed to the disk: what is lost is a few seconds old
            os.replace(temporary, self._path)
            if self._closed:
                self._path.unlink(missing_ok=True)

    def plain(self) -> dict[str, Any]:
        """The content, as JSON-like data."""
        steps_per_s, tokens_per_s = self._speed()
        phase = self.phase() or ("train" if self._metrics else "load")  # a pack has no phases of its members
        left = self.steps - self._step if self.steps is not None and phase == "train" else None
        return {
            **self._fixed,
            "at": time.time(),
            "phase": phase,
            "step": self._step,
            "steps": self.steps,
            "left_s": left / steps_per_s if left is not None and steps_per_s else None,
            "tokens_per_s": tokens_per_s,
            "memory_gib": _used_gib(self._device),
            "predicted_gib": self.predicted_gib,
            "room_gib": self._room_gib if self._room_gib is not None else _total_gib(self._device),
            "metrics": {name: value for name, value in self._metrics.items() if math.isfinite(value)},
        }

    def _speed(self) -> tuple[float | None, float | None]:
        """Steps and tokens a second."""
        points = list(self._points)
        if len(points) < 2 or points[-1][0] <= points[0][0]:
            return None, None
        seconds = points[-1][0] - points[0][0]
        tokens = points[-1][2] - points[0][2]
        return (points[-1][1] - points[0][1]) / seconds, tokens / seconds if tokens else None


class _Beats:
    """Writes the files of this process's trials, in a thread that begins with the first of them."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[Live] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, live: Live) -> None:
        """Write this one, too."""
        with self._lock:
            self._live.add(live)
            if self._thread is None or not self._thread.is_alive():  # it may have died, or stayed in a forked process
                self._thread = threading.Thread(target=self._write, name="live", daemon=True)
                self._thread.start()

    def _write(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self._lock:
                running = list(self._live)
            for live in running:
                live.beat()


_BEATS = _Beats()


def _used_gib(device: str) -> float | None:
    """What this process's allocator holds of the GPU; on the CPU, its resident memory."""
    if not device.startswith("cuda"):
        import psutil

        return float(psutil.Process().memory_info().rss / GIB)
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.memory_reserved(device) / GIB)


def _total_gib(device: str) -> float | None:
    torch = sys.modules.get("torch")
    if not device.startswith("cuda") or torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.get_device_properties(device).total_memory / GIB)
