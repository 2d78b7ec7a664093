"""rayjob.yaml is a RayJob of KubeRay. No Python package ships its schema, so its structure is checked here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_peft import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "rayjob.yaml").read_text(encoding="utf-8")
SPEC_KEYS = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
CLUSTER_KEYS = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CONTAINER_KEYS = {"name", "image", "env", "envFrom", "resources", "volumeMounts"}


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_every_key_is_one_of_kuberay(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"].keys() <= SPEC_KEYS
    assert job["spec"]["rayClusterSpec"].keys() <= CLUSTER_KEYS
    for group in groups(job):
        assert group.keys() <= GROUP_KEYS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container.keys() <= CONTAINER_KEYS


def test_its_command_is_ours_and_its_ray_is_the_pinned_one(job):
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "ray-peft"
    space = cli._parser().parse_args(arguments).space
    assert (ROOT / space.removeprefix("/home/ray/ray_peft/")).is_file()
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_trials_run_on_workers_alone_which_come_on_demand(job):
    head, *workers = groups(job)
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    for worker in workers:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
        (container,) = worker["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) > 0


def test_all_pods_share_the_folder_of_results_and_no_secret_stands_in_the_file(job):
    for group in groups(job):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert all(isinstance(value, str) for value in variables.values())
        assert variables["RAY_PEFT_OUTPUTS"].startswith(mounts["shared"])
        assert not [name for name in variables if re.search("TOKEN|PASSWORD|SECRET|KEY", name)]
        assert container["envFrom"][0]["secretRef"]["name"] == "ray-peft"
