"""Sweeps as jobs of a cluster: submitted, listed, followed, stopped, fetched; the owner of Ray's job client."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import secrets
import shlex
import socket
import tarfile
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_peft.errors import JobError, PlacementError, first_line
from ray_peft.foundation.masking import mask
from ray_peft.schedule import packed_results
from ray_peft.schedule.environment import SECRETS_FILE, Environment
from ray_peft.schedule.package import SECRETS

AnswerT = TypeVar("AnswerT")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT_S = 60
"""How long Ray lets a stopped job end its trials before it kills it; Ray's own default is 3 s."""
POLL_S = 1.0
RECONNECTS = 5
"""Times that a broken log connection is opened again without one line between."""
FETCH_WITHIN_S = 180.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""Ray's states of a job that has ended."""
_NAME, _OUT = "ray_peft.name", "ray_peft.out"


@dataclass(frozen=True)
class Job:
    """A sweep on a cluster."""

    job_id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    name: str
    """Of its search space."""
    out: str
    """Its folder there, as its shell reads it."""
    began: float | None
    """Seconds since 1970; None before it begins."""
    ended: float | None
    exit_code: int | None
    message: str
    """What Ray says of its state."""

    @property
    def folder(self) -> str:
        """Its folder there, as people write it."""
        plain = re.sub(r'"\$\{RAY_PEFT_OUTPUTS:\?[^}]*\}"', "$RAY_PEFT_OUTPUTS", self.out)
        return "".join(shlex.split(plain))


@dataclass(frozen=True)
class Submission:
    """A sweep to submit."""

    name: str
    arguments: tuple[str, ...]
    """Of `ray-peft sweep`, without --out."""
    out: str | None
    """An absolute folder on the cluster; None takes the cluster's RAY_PEFT_OUTPUTS."""
    python: str
    environment: Environment

    @property
    def shell_out(self) -> str:
        """The folder for a shell on the cluster, which complains where nothing names one."""
        if self.out is not None:
            return shlex.quote(self.out)
        outputs = self.environment.plain.get("RAY_PEFT_OUTPUTS")
        if outputs:
            return shlex.quote(f"{outputs}/{self.name}")
        # A job's own folder goes with it, so there is no other default.
        word = "set it on the cluster to a folder that all nodes share, or submit with --out"
        return f'"${{RAY_PEFT_OUTPUTS:?{word}}}"/{shlex.quote(self.name)}'


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Connect to a cluster's dashboard.

        Args:
            address: of the dashboard, such as http://127.0.0.1:8265; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS if
                that is an http address, else this machine's.

        Raises:
            PlacementError: nothing answers there, or it wants another token.
        """
        self.address = dashboard_address(address, os.environ)
        _check_reachable(self.address)
        if "RAY_AUTH_MODE" not in os.environ and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_MODE"] = "token"  # a token that is given is meant to be used
        self._client = self._asked(lambda: _client(self.address))

    def submit(self, submission: Submission, folder: Path) -> str:
        """Start a sweep from a packed `folder`; returns the job's id."""
        words = [submission.python, "-m", "ray_peft", "sweep", *submission.arguments]
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **submission.environment.plain}
        if submission.environment.secret:
            variables[SECRETS_FILE] = SECRETS
        return self._asked(
            lambda: str(
                self._client.submit_job(
                    entrypoint=f"{shlex.join(words)} --out {submission.shell_out}",
                    submission_id=f"{_short_name(submission.name)}-{secrets.token_hex(4)}",
                    runtime_env={"working_dir": str(folder), "env_vars": variables},
                    metadata={_NAME: submission.name, _OUT: submission.shell_out},
                )
            )
        )

    def list(self) -> list[Job]:
        """The sweeps that were submitted with ray-peft, the newest last."""
        jobs = self._asked(self._client.list_jobs)
        own = [_job(job) for job in jobs if job.submission_id and _NAME in (job.metadata or {})]
        return sorted(own, key=lambda job: job.began or time.time())

    def info(self, job_id: str) -> Job:
        """One job.

        Raises:
            JobError: the cluster does not know it.
        """
        return _job(self._asked(lambda: self._client.get_job_info(job_id), job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Give a job's log to `show` from its beginning, secrets masked, until the job has ended; returns its end.

        Raises:
            JobError: the cluster does not know it, or its log cannot be read any more.
        """
        import aiohttp

        shown, skip, failures = 0, 0, 0

        def take(text: str) -> None:
            nonlocal shown, skip
            fresh, skip = text[skip:], max(0, skip - len(text))
            shown += len(fresh)
            if fresh:
                show(mask(fresh))

        while True:
            before = skip = shown  # the log comes from its beginning again
            try:
                asyncio.run(self._log(job_id, take))
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures = 0 if shown > before else failures + 1
                if failures > RECONNECTS:
                    raise JobError(
                        f"the log of {job_id} cannot be read any more: {first_line(error)}; the job itself goes on: "
                        f"ray-peft jobs --address {self.address}"
                    ) from None
            job = self.info(job_id)
            if job.state in ENDED:
                return job
            time.sleep(POLL_S)

    def stop(self, job_id: str) -> Job:
        """End a job as Ctrl-C ends a sweep, and wait for it; returns its end."""
        self._asked(lambda: self._client.stop_job(job_id), job_id)
        until = time.monotonic() + STOP_WAIT_S + 30
        while self.info(job_id).state not in ENDED and time.monotonic() < until:
            time.sleep(POLL_S)
        return self.info(job_id)

    def fetch(self, job_id: str, python: str) -> tarfile.TarFile:
        """The results of a job, read on the cluster's head by a small job that is deleted afterwards.

        Raises:
            JobError: the cluster does not know the job, or its folder cannot be read from there.
        """
        details = self._asked(lambda: self._client.get_job_info(job_id), job_id)
        job = _job(details)
        if not job.out:
            raise JobError(f"{job_id} was not submitted with ray-peft, so nothing says where its results are")
        variables = (details.runtime_env or {}).get("env_vars") or {}
        folder_variables = {name: variables[name] for name in ("RAY_PEFT_OUTPUTS",) if name in variables}
        code = Path(packed_results.__file__).read_text(encoding="utf-8")
        reader = self._asked(
            lambda: self._client.submit_job(
                entrypoint=f"{shlex.quote(python)} -c {shlex.quote(code)} {job.out}",
                submission_id=f"fetch-{secrets.token_hex(4)}",
                runtime_env={"env_vars": folder_variables},
            )
        )
        until = time.monotonic() + FETCH_WITHIN_S
        while (state := self.info(reader).state) not in ENDED:
            if time.monotonic() > until:
                self._asked(lambda: self._client.stop_job(reader), reader)
                raise JobError(f"the results of {job_id} did not come within {FETCH_WITHIN_S:g} s (job {reader})")
            time.sleep(POLL_S)
        log = self._asked(lambda: self._client.get_job_logs(reader), reader)
        message = self.info(reader).message
        self._asked(lambda: self._client.delete_job(reader), reader)
        if packed_results.NOTHING in log.splitlines():
            raise JobError(
                f"{job_id}: there are no results in {job.folder} on the cluster's head, where its driver runs"
            )
        if state != "SUCCEEDED":
            raise JobError(f"the results of {job_id} cannot be read from {job.folder}: {message.strip()[-300:]}")
        return unpacked(log)

    async def _log(self, job_id: str, take: Callable[[str], None]) -> None:
        """Give a job's log to `take` as it comes, until Ray closes it."""
        async for text in self._client.tail_job_logs(job_id):
            take(text)

    def _asked(self, question: Callable[[], AnswerT], job_id: str = "") -> AnswerT:
        """What the cluster answers, with one clear error for what it may not do."""
        import ray
        import requests

        try:
            return question()
        except ray.exceptions.AuthenticationError as error:
            wrong = "403" in str(error) or os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
            reason = "does not take this token" if wrong else "wants a token"
            raise PlacementError(
                f"the cluster at {self.address} {reason}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file "
                "with the cluster's token (or RAY_AUTH_TOKEN to the token itself)"
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise _unreachable(self.address, first_line(error)) from None
        except RuntimeError as error:
            text = mask(str(error))
            if "status code 404" in text and "does not exist" in text:
                raise JobError(
                    f"the cluster at {self.address} knows no job {job_id}; "
                    f"its jobs: ray-peft jobs --address {self.address}"
                ) from None
            raise JobError(f"the cluster at {self.address} refuses: {text[:300]}") from None


def dashboard_address(address: str | None, variables: Mapping[str, str]) -> str:
    """The http address of a cluster's dashboard; one without a scheme, such as host:8265, gets http.

    Raises:
        PlacementError: it is no such address.
    """
    joined = variables.get("RAY_ADDRESS", "")
    address = (
        address
        or variables.get("RAY_API_SERVER_ADDRESS")
        or (joined if joined.startswith(("http://", "https://")) else DEFAULT_ADDRESS)
    )
    whole = address if "://" in address else f"http://{address}"
    parts = urllib.parse.urlsplit(whole)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PlacementError(f"--address: give the dashboard's address, such as {DEFAULT_ADDRESS} (found {address})")
    return whole.rstrip("/")


def unpacked(log: str) -> tarfile.TarFile:
    """The results inside the log of the job that read them."""
    _, _, rest = log.partition(f"{packed_results.BEGIN}\n")
    text, end, _ = rest.partition(packed_results.END)
    if not end:
        raise JobError("the results came cut off; fetch them again")
    return tarfile.open(fileobj=io.BytesIO(base64.b64decode(text)), mode="r:xz")


def _check_reachable(address: str) -> None:
    """Ray's client itself has no limit on how long it tries."""
    parts = urllib.parse.urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, first_line(error)) from None


def _unreachable(address: str, reason: str) -> PlacementError:
    return PlacementError(
        f"no Ray dashboard answers at {mask(address)} ({reason}); give its address with --address, such as "
        f"{DEFAULT_ADDRESS}, and of a distant cluster forward it first: ray dashboard cluster.yaml"
    )


def _client(address: str) -> Any:
    """Ray's client. Ray prefers these variables to the address that it is given."""
    from ray.job_submission import JobSubmissionClient

    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(address)
    finally:
        os.environ |= before


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        job_id=details.submission_id or details.job_id,
        state=str(details.status.value),
        name=metadata.get(_NAME, ""),
        out=metadata.get(_OUT, ""),
        began=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=mask(details.message or ""),
    )


def _short_name(name: str) -> str:
    """A search space's name as part of a job's id."""
    return "".join(character if character.isascii() and character.isalnum() else "_" for character in name)[:40]
