"""cluster.yaml is what Ray's launcher accepts, and keeps the cluster closed."""

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
COMMAND_KEYS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def on_premise() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def aws() -> dict[str, Any]:
    """The file with its commented part in place, as its comment tells the reader to do."""
    commented = TEXT[TEXT.index("# ---- In a cloud: AWS") :].splitlines()[1:]
    cloud = yaml.safe_load("\n".join(line[2:] for line in commented if not line.startswith("##")))
    return on_premise() | cloud


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key in COMMAND_KEYS for command in config.get(key, [])]


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it touches a machine."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


both = pytest.mark.parametrize("load", [on_premise, aws])


@both
def test_ray_accepts_the_file(load):
    prepared = accept(load())
    assert prepared["head_start_ray_commands"] == load()["head_start_ray_commands"]


def test_in_a_cloud_no_trial_runs_on_the_head_and_gpus_come_on_demand():
    types = accept(aws() | {"provider": {"type": "aws", "region": "us-east-1"}})["available_node_types"]
    head = types.pop("head")
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    assert all(node_type["max_workers"] > 0 for node_type in types.values())


def test_every_worker_address_becomes_a_worker():
    node_type = accept(on_premise())["available_node_types"]["local.cluster.node"]
    assert node_type["min_workers"] == node_type["max_workers"] == len(on_premise()["provider"]["worker_ips"])


@both
@pytest.mark.parametrize("misspelt", ["setup_comands", "file_mount", "worker_start_commands"])
def test_a_misspelt_key_is_refused(load, misspelt):
    with pytest.raises(jsonschema.ValidationError, match=misspelt):
        accept(load() | {misspelt: []})


def test_a_misspelt_login_key_is_refused():
    config = on_premise()
    config["auth"]["ssh_usr"] = "ubuntu"
    with pytest.raises(jsonschema.ValidationError, match="ssh_usr"):
        accept(config)


def test_addresses_are_those_reserved_for_documentation():
    assert set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", TEXT)) - {"127.0.0.1"} <= {f"192.0.2.{n}" for n in range(256)}


@both
def test_no_dashboard_listens_to_the_network(load):
    heads = [command for command in commands(load()) if "ray start --head" in command]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert not re.search(r"0\.0\.0\.0|--dashboard-host[= ](?!127\.0\.0\.1\b)|=::", TEXT)


@both
def test_no_command_disables_authentication(load):
    assert not re.search(r"AUTH_MODE\W+(?!token\b)", TEXT)
    assert not [command for command in commands(load()) if re.search(r"unset\s+RAY_AUTH|RAY_AUTH_TOKEN=", command)]
    for command in commands(load()):
        if "ray start" in command:
            assert command.startswith(". ~/.ray_peft_env && "), f"{command} would start without the token"


def test_the_environment_of_the_nodes(tmp_path):
    """Runs the command that writes it, with a home folder of its own."""
    (write,) = [command for command in on_premise()["setup_commands"] if "> ~/.ray_peft_env" in command]
    shown = subprocess.run(
        ["bash", "-c", f"({write}) && . ~/.ray_peft_env && env"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    env = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / ".ray" / "auth_token")
    assert env["RAY_AUTH_TOKEN_PATH"].replace(str(tmp_path), "~") in on_premise()["file_mounts"]
    assert env["MLFLOW_TRACKING_URI"].startswith("http://")
    assert Path(env["RAY_PEFT_OUTPUTS"]).is_absolute()
    assert env["PATH"].startswith(str(tmp_path / "ray_peft" / ".venv" / "bin"))
    assert "OMP_NUM_THREADS" not in env


@both
def test_every_command_is_a_shell_command(load):
    for command in commands(load()):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_is_copied_to_the_nodes_exists():
    local_paths = [path for path in on_premise()["file_mounts"].values() if not path.startswith("~")]
    assert local_paths
    assert not [path for path in local_paths if not (ROOT / path).exists()]
