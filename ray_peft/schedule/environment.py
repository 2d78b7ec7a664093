"""The settings in a driver's environment that its workers need, secrets apart from the others.

Whoever may ask a Ray cluster for its jobs sees their `env_vars` in plain text, so secrets never stand there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_peft.errors import PlacementError
from ray_peft.foundation.masking import mask

PREFIXES = ("RAY_PEFT_", "HF_", "MLFLOW_")
"""Variables with these beginnings go where the trials run."""
SECRETS_FILE = "RAY_PEFT_SECRETS_FILE"
"""The variable that names a job's file of secrets."""
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL|AUTH", re.I)
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In which Ray tells a job's driver its own runtime environment."""


@dataclass(frozen=True, repr=False)
class Environment:
    """Variables by name. It has no text form, so that no log shows a secret."""

    plain: Mapping[str, str]
    secret: Mapping[str, str]
    """Passwords and tokens, and addresses that hold one."""

    def value(self, name: str) -> str | None:
        """A variable's value; None if it is not among them."""
        return self.plain.get(name, self.secret.get(name))


def environment(variables: Mapping[str, str]) -> Environment:
    """Those of `variables` that trials need."""
    needed = {name: value for name, value in sorted(variables.items()) if name.startswith(PREFIXES)}
    needed.pop(SECRETS_FILE, None)
    return split(needed)


def split(variables: Mapping[str, str]) -> Environment:
    """Secrets apart from the others: by their names, or by what `mask` would hide in their values."""
    secret = {name for name, value in variables.items() if is_secret(name, value)}
    return Environment(
        {name: value for name, value in variables.items() if name not in secret},
        {name: variables[name] for name in variables if name in secret},
    )


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value must not be shown."""
    return (_SECRET.search(name) is not None and not name.endswith("_PATH")) or mask(value) != value


def take_secrets() -> None:
    """Put the secrets that `ray-peft submit` sent with this job into this process's environment.

    Raises:
        PlacementError: the file that was sent is not there.
    """
    name = os.environ.pop(SECRETS_FILE, None)
    if name is None:
        return
    path = Path(name)
    try:
        path.chmod(0o600)  # Ray unpacks it as readable for everybody on the machine
        secrets = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlacementError(f"{SECRETS_FILE}: cannot read {path.absolute()}: {error}; submit the job again") from None
    os.environ.update(secrets)


def for_workers(fixed: Mapping[str, str]) -> dict[str, object]:
    """Ray's runtime environment for the workers of a driver that joins a cluster.

    Args:
        fixed: variables that every worker gets.
    """
    own = environment(os.environ)
    # Ray refuses a variable that the job's own runtime environment sets, too.
    job: dict[str, dict[str, object]] = json.loads(os.environ.get(_JOB_CONFIG) or "{}")
    set_by_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    variables = {name: value for name, value in {**own.plain, **fixed}.items() if name not in set_by_job}  # type: ignore[operator]
    settings: dict[str, object] = {"env_vars": variables}
    if own.secret:
        settings["worker_process_setup_hook"] = _setter(dict(own.secret))
    return settings


def _setter(secrets: dict[str, str]) -> Callable[[], None]:
    """A function that Ray stores inside the cluster and calls as each worker starts; no listing of jobs shows it."""

    def set_secrets() -> None:
        import os

        os.environ.update(secrets)

    return set_secrets
