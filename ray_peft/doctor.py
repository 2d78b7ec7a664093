"""What this machine can do for fine-tuning: one probe per question, ending in findings and never in a traceback."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import importlib.metadata
import io
import os
import platform
import shutil
import socket
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from ray_peft.foundation.masking import mask_address
from ray_peft.foundation.units import GIB

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "note", "problem"]
T = TypeVar("T")

NETWORK_TIMEOUT_S = 3.0
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
LINE_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    level: Level = "ok"
    """"note": works, with a limit worth knowing; "problem": something that will fail."""
    advice: str = ""
    """One sentence on what to do, or empty."""


@dataclass(frozen=True)
class GpuFacts:
    """One NVIDIA GPU as the driver sees it."""

    name: str
    total_gib: float
    free_gib: float
    capability: tuple[int, int]


def examine() -> list[Finding]:
    """What was found, in the order of the table. Takes some seconds: it imports torch and bitsandbytes."""
    findings = [finding for name, probe in PROBES for finding in _guarded(name, probe)]
    return [replace(f, value=mask_address(f.value), advice=mask_address(f.advice)) for f in findings]


def render(findings: list[Finding]) -> str:
    """A table in plain ASCII, so that every console can show it; advice stands under its finding."""
    name_width = max((len(_ascii(finding.name)) for finding in findings), default=0)
    indent = " " * (len("problem") + 2 + name_width + 2)
    lines = []
    for finding in findings:
        head = f"{finding.level:<7}  {_ascii(finding.name):<{name_width}}  "
        lines += _wrap(_ascii(finding.value) or "-", head, indent)
        lines += _wrap(_ascii(finding.advice), f"{indent}-> ", f"{indent}   ")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "note")}
    lines += ["", ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())]
    return "\n".join(lines)


def _guarded(name: str, probe: Callable[[], list[Finding]]) -> list[Finding]:
    """The probe's findings; whatever it raises becomes one finding."""
    try:
        return probe()
    except Exception as error:  # A report on a broken machine must not break with it.
        return [Finding(name, f"{type(error).__name__}: {error}", "problem", "This could not be examined.")]


def _ascii(text: str) -> str:
    """`text` on one line; what is not printable ASCII is escaped."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError.

    Socket timeouts bound neither name resolution nor a server that answers byte by byte, so the caller stops waiting.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # Raised again below, in the caller's thread.
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _python() -> list[Finding]:
    version = platform.python_version()
    if sys.version_info >= (3, 15):
        return [Finding("Python", version, "note", "requirements.lock was made for Python 3.11 to 3.14.")]
    return [Finding("Python", version)]


def _system() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = Path("/sys/fs/cgroup/memory.max")
    total = memory.total
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        total = min(total, int(text))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    value = f"{total / GIB:.1f} GiB, {min(memory.available, total) / GIB:.1f} GiB available"
    system, size = Finding("system", platform.platform()), Finding("memory", value)
    if sys.platform != "linux":
        system = replace(system, level="note", advice="Training on GPUs is tested on Linux only.")
    if total < 8 * GIB:
        size = replace(size, level="note", advice="Ray and one trial want about 8 GiB.")
    return [system, Finding("CPU cores", str(cores)), size]


def _torch() -> list[Finding]:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [Finding("torch", f"{torch.__version__}, built for {built_for}")]


def _gpus() -> list[Finding]:
    """The GPUs that the driver shows (NVML), else those that PyTorch shows, and whether PyTorch can compute on them."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver, gpus = _gpus_from_driver() or ("", _gpus_from_torch(usable))
    if not gpus:
        return [Finding("GPUs", "none", "note", "Trials run on the CPU, which is right for small models only.")]
    findings = [_describe(index, gpu, driver) for index, gpu in enumerate(gpus)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    value = f"{usable} of {len(gpus)}" + ("" if hidden is None else f", CUDA_VISIBLE_DEVICES={hidden}")
    if usable == 0 and hidden is None:
        return [*findings, Finding("GPUs for torch", value, "problem", _cuda_build())]
    findings.append(Finding("GPUs for torch", value, "ok" if usable == len(gpus) else "note"))
    for index in range(usable):
        findings += _guarded(f"cuda:{index}", functools.partial(_try, index))
    return findings


CUDA_BUILDS = (130, 128, 126)
"""CUDA versions that torch is built for, as in cu130, the newest first."""


def _cuda_build() -> str:
    """What to do where the driver shows GPUs that torch cannot use."""
    import pynvml
    import torch

    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 12080 is CUDA 12.8
        newest = number // 1000 * 10 + number % 1000 // 10
    except pynvml.NVMLError:
        newest = CUDA_BUILDS[0]
    build = next((version for version in CUDA_BUILDS if version <= newest), None)
    if build is None:
        return f"This driver is for CUDA {newest / 10:g}; torch needs {CUDA_BUILDS[-1] / 10:g} or later: update it."
    if torch.version.cuda:
        return "torch is built for CUDA and finds no GPU: is the driver newer than the running kernel's? Restart."
    release = torch.__version__.partition("+")[0]
    return (
        "This torch is built for CPUs. Install the one for this driver: python -m pip install --force-reinstall "
        f"torch=={release} --index-url https://download.pytorch.org/whl/cu{build}"
    )


def _gpus_from_driver() -> tuple[str, list[GpuFacts]] | None:
    """The driver's version and its GPUs; None without a driver, or where it does not tell (some unified memory)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            gpus.append(GpuFacts(name, memory.total / GIB, memory.free / GIB, (major, minor)))
        return pynvml.nvmlSystemGetDriverVersion(), gpus
    except pynvml.NVMLError:
        return None


def _gpus_from_torch(count: int) -> list[GpuFacts]:
    import torch

    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(GpuFacts(name, total / GIB, free / GIB, capability))
    return gpus


def _describe(index: int, gpu: GpuFacts, driver: str) -> Finding:
    value = (
        f"{gpu.name}, {gpu.total_gib:.1f} GiB, {gpu.free_gib:.1f} GiB free, "
        f"compute capability {gpu.capability[0]}.{gpu.capability[1]}" + (f", driver {driver}" if driver else "")
    )
    if gpu.free_gib < 0.8 * gpu.total_gib:
        return Finding(f"GPU {index}", value, "note", "Other programs hold memory that trials will lack.")
    return Finding(f"GPU {index}", value)


def _try(index: int) -> list[Finding]:
    """Compute a small product on GPU number `index` of PyTorch."""
    import torch

    ones = torch.ones(16, 16, device=f"cuda:{index}")
    correct = bool((ones @ ones == 16).all())
    return [] if correct else [Finding(f"cuda:{index}", "a 16x16 product is wrong", "problem", "Do not train on it.")]


def _bfloat16() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        advice = "Fast only on CPUs with bfloat16 instructions (AMX, AVX512-BF16); others want float32."
        return [Finding("bfloat16", "computed on the CPU", "note", advice)]
    lacking = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
    if lacking:
        advice = "Set the dtype to float16 or float32: bfloat16 needs compute capability 8.0."
        return [Finding("bfloat16", f"not on GPU {', '.join(map(str, lacking))}", "note", advice)]
    return [Finding("bfloat16", "on every GPU")]


def _bitsandbytes() -> list[Finding]:
    import torch

    # bitsandbytes reports on stdout what it could not load; the product below says whether that matters.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import bitsandbytes

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        error = _four_bit_error(device)
    value = f"{bitsandbytes.__version__}, 4-bit product on {device.type}: relative error {error:.2f}"
    if not error < 0.25:  # NF4 of normal weights errs by about 0.09; NaN fails too
        return [Finding("bitsandbytes", value, "problem", "QLoRA will not train on this device.")]
    if device.type == "cpu":
        slower = _four_bit_slowdown()
        advice = f"A 4-bit layer takes {slower:.1f} times as long as a float32 one, measured now (256 x 1024 x 1024)."
        return [Finding("bitsandbytes", value, "note", advice)]
    return [Finding("bitsandbytes", value)]


def _four_bit_error(device: torch.device) -> float:
    """Relative error of x W^T with W in NF4, for W of 128 x 128 standard normal numbers."""
    import bitsandbytes
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator).to(device)
    x = torch.randn(8, 128, generator=generator).to(device)
    stored, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    product = bitsandbytes.matmul_4bit(x, stored.t(), quant_state=state)  # type: ignore[attr-defined]  # not in __all__
    exact = x @ weight.t()
    return float((product - exact).norm() / exact.norm())


def _four_bit_slowdown() -> float:
    """Time of a pass forward and backward through a 4-bit layer on the CPU, over that through a float32 one.

    Both layers are of 1024 x 1024, the input is of 256 rows; the best of five passes each.
    """
    import bitsandbytes
    import torch

    plain = torch.nn.Linear(1024, 1024, bias=False)
    stored = bitsandbytes.nn.Linear4bit(  # type: ignore[attr-defined, no-untyped-call]  # not in __all__
        1024, 1024, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    stored.load_state_dict(plain.state_dict())
    stored = stored.to("cpu")  # quantises
    x = torch.randn(256, 1024, requires_grad=True)

    def seconds(layer: torch.nn.Module) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            layer(x).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(stored) / seconds(plain.requires_grad_(False))


def _ray() -> list[Finding]:
    version = importlib.metadata.version("ray")
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return [Finding("Ray", f"{version}, starts on this machine (no RAY_ADDRESS)")]
    if address == "auto":
        return [Finding("Ray", f"{version}, joins the cluster on this machine (RAY_ADDRESS=auto)")]
    value = f"{version}, RAY_ADDRESS={address}"
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    advice = "Start the cluster, or unset RAY_ADDRESS to run on this machine."
    try:
        port = parts.port or {"http": 8265, "https": 443, "ray": 10001}.get(parts.scheme, 6379)
        _within(NETWORK_TIMEOUT_S, lambda: socket.create_connection((parts.hostname, port), NETWORK_TIMEOUT_S).close())
    except (OSError, ValueError) as error:
        return [Finding("Ray", f"{value}: not reachable ({_reason(error)})", "problem", advice)]
    if parts.scheme in ("http", "https"):
        return [Finding("Ray", f"{value}: reachable", "note", "An http address serves `ray job submit` only.")]
    return [Finding("Ray", f"{value}: reachable")]


def _ray_token() -> list[Finding]:
    name, mode = "Ray authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        advice = "Whoever reaches Ray's ports can run programs here: unset RAY_AUTH_MODE outside of a closed machine."
        return [Finding(name, "disabled by RAY_AUTH_MODE", "note", advice)]
    stated = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE not set"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding(name, f"{stated}, token in RAY_AUTH_TOKEN")]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
            return [Finding(name, f"{stated}, no token in {path}", "problem", "Copy the cluster's token to that file.")]
        return [Finding(name, f"{stated}, no token yet; Ray makes one when it starts here")]
    if os.name == "posix" and path.stat().st_mode & 0o077:
        return [Finding(name, f"{stated}, token in {path}", "note", f"Others can read it: chmod 600 {path}")]
    return [Finding(name, f"{stated}, token in {path}")]


def _mlflow() -> list[Finding]:
    version = importlib.metadata.version("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return [Finding("MLflow", f"{version}, no MLFLOW_TRACKING_URI")]
    if urlsplit(uri).scheme not in ("http", "https"):
        return [Finding("MLflow", f"{version}, {uri}: not a server, so not contacted")]
    try:
        status = _within(NETWORK_TIMEOUT_S, lambda: _health_status(uri))
    except (OSError, ValueError, http.client.HTTPException) as error:
        advice = "Start the server (mlflow server), or correct or unset MLFLOW_TRACKING_URI."
        return [Finding("MLflow", f"{version}, {uri}: not reachable ({_reason(error)})", "problem", advice)]
    value = f"{version}, {uri}: reachable"
    if status in (401, 403):
        advice = "It asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        return [Finding("MLflow", value, "note", advice)]
    if status != 200:
        return [Finding("MLflow", f"{value}, but /health answers {status}", "note", "Is it an MLflow server?")]
    return [Finding("MLflow", value)]


def _health_status(uri: str) -> int:
    """The HTTP status of the tracking server's /health."""
    parts = urlsplit(uri)
    address = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit((parts.scheme, address, parts.path.rstrip("/") + "/health", "", "")))
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def _reason(error: Exception) -> str:
    """Why a server was not reached; a malformed address is not quoted, since its parts may be a password's."""
    if isinstance(error, (ValueError, http.client.HTTPException)):
        return f"malformed address or answer, {type(error).__name__}"
    return str(getattr(error, "reason", None) or error)


def _disk() -> list[Finding]:
    folder = Path(os.environ.get("RAY_PEFT_OUTPUTS") or "outputs").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    value = f"{folder}, {free_gib:.1f} GiB free"
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return [Finding("output folder", f"{value}, not writable", "problem", "Choose another one: RAY_PEFT_OUTPUTS.")]
    if free_gib < 10:
        level: Level = "problem" if free_gib < 1 else "note"
        return [Finding("output folder", value, level, "Checkpoints need room: set RAY_PEFT_OUTPUTS to a larger disk.")]
    return [Finding("output folder", value)]


def _console() -> list[Finding]:
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    advice = "Set PYTHONIOENCODING=utf-8: text that a model writes may otherwise be shown escaped, or fail."
    try:
        "ABCxyz 0189 ~{|} \u00e9 \u2192 \u4e2d \U0001f600".encode(encoding)
    except UnicodeEncodeError:
        return [Finding("console", f"{encoding}, prints our tables but not every language", "note", advice)]
    except LookupError:
        return [Finding("console", encoding, "note", advice)]
    return [Finding("console", f"{encoding}, prints every language")]


def _hub() -> list[Finding]:
    """Whether the hub answers; not asked where a flag forbids it."""
    name = "Hugging Face hub"
    flags = [f"{flag}={os.environ[flag]}" for flag in OFFLINE_FLAGS if os.environ.get(flag)]
    flag_list = "".join(f", {flag}" for flag in flags)
    advice = "Models and data sets must be local folders, or in the cache already."
    if any(flag.partition("=")[2].upper() in ("1", "TRUE", "YES", "ON") for flag in flags):
        return [Finding(name, f"offline{flag_list}", "note", advice)]
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        _within(NETWORK_TIMEOUT_S, lambda: _answers(address))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return [Finding(name, f"{address}: not reachable ({_reason(error)}){flag_list}", "note", advice)]
    return [Finding(name, f"{address}: reachable{flag_list}")]


def _answers(address: str) -> None:
    """Ask a web server for anything; an error that it answers with is an answer, too."""
    request = urllib.request.Request(address, method="HEAD")
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S):
        pass


PROBES: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("Python", _python),
    ("system", _system),
    ("torch", _torch),
    ("GPUs", _gpus),
    ("bfloat16", _bfloat16),
    ("bitsandbytes", _bitsandbytes),
    ("Ray", _ray),
    ("Ray authentication", _ray_token),
    ("MLflow", _mlflow),
    ("output folder", _disk),
    ("console", _console),
    ("Hugging Face hub", _hub),
)
