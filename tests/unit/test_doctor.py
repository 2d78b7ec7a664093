"""The doctor examines this machine without a traceback, without secrets and within its time."""

import re
import socket
import stat
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ray_peft.doctor import examination, findings, hardware, services
from ray_peft.doctor.examination import examine
from ray_peft.doctor.findings import Finding, render
from ray_peft.foundation.masking import mask_address


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """A machine on which nothing is configured."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_PEFT_OUTPUTS", "http_proxy", "HTTP_PROXY", *services.OFFLINE_FLAGS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused, and nobody else gets it
        yield taken.getsockname()[1]


@pytest.fixture
def silent_port():
    """A server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def http_server():
    """A server that answers every request with `status`, and keeps the requests' paths and logins."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.status, server.seen = 200, []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_this_machine_is_examined(monkeypatch, closed_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:s3cret@127.0.0.1:{closed_port}")
    findings = examine()
    by_name = {finding.name: finding for finding in findings}
    assert {"Python", "torch", "memory", "Ray", "output folder", "console"} <= set(by_name)
    assert by_name["bitsandbytes"].level != "problem", by_name["bitsandbytes"]
    assert "relative error 0." in by_name["bitsandbytes"].value
    if "on cpu" in by_name["bitsandbytes"].value:
        slower = re.search(r"takes ([\d.]+) times as long", by_name["bitsandbytes"].advice)
        assert slower is not None
        assert 0.1 < float(slower[1]) < 100
    assert by_name["MLflow"].level == "problem"
    assert not [finding for finding in findings if "could not be examined" in finding.advice]
    text = render(findings)
    assert "s3cret" not in text
    assert "ada" not in text
    assert f"***@127.0.0.1:{closed_port}" in text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ada:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("https://s3cret@host", "https://***@host"),
        ("http://ada:s3@cret@host", "http://***@host"),
        ("http://ada:s3/cret@host", "http://***@host"),
        ("http://ada:s3 cret@host", "http://***@host"),
        ("postgresql+psycopg://ada:s3cret@db/runs", "postgresql+psycopg://***@db/runs"),
        ("see 'http://ada:s3cret@host/x' now", "see 'http://***@host/x' now"),
        ("https://host/x?user=ada&access_token=s3cret&y=1", "https://host/x?user=ada&access_token=***&y=1"),
        ("postgresql:///runs?password=s3cret", "postgresql:///runs?password=***"),
    ],
)
def test_credentials_are_masked(uri, shown):
    assert mask_address(uri) == shown


@pytest.mark.parametrize(
    "text", ["http://host:5000", "sqlite:////data/me@home/mlflow.db", "file:///x", "user@host", "3.17.2"]
)
def test_what_holds_no_credentials_stays(text):
    assert mask_address(text) == text


@pytest.mark.parametrize(
    "password", ["s3cret", "s3cret/pw", "s3cret?pw", "s3cret#pw", "s3cret pw", "s3cret@pw", "%zz:[s3cret"]
)
def test_no_error_quotes_a_password(monkeypatch, closed_port, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:{password}@127.0.0.1:{closed_port}")
    monkeypatch.setattr(examination, "PROBES", (("MLflow", services._mlflow),))
    finding = only(examine())
    assert finding.level == "problem"
    assert "s3cret" not in render([finding])


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "RAY_ADDRESS"])
def test_a_closed_port_is_a_problem(monkeypatch, closed_port, variable):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{closed_port}")
    probe = {"MLFLOW_TRACKING_URI": services._mlflow, "RAY_ADDRESS": services._ray}[variable]
    start = time.monotonic()
    finding = only(probe())
    assert time.monotonic() - start < services.NETWORK_TIMEOUT_S
    assert finding.level == "problem"
    assert "refused" in finding.value
    assert variable in finding.advice


def test_a_server_that_never_answers_is_given_up(monkeypatch, silent_port):
    monkeypatch.setattr(services, "NETWORK_TIMEOUT_S", 0.3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
    start = time.monotonic()
    finding = only(services._mlflow())
    assert time.monotonic() - start < 2
    assert finding.level == "problem"


def test_waiting_ends_even_when_the_work_does_not():
    release = threading.Event()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        services._within(0.2, release.wait)
    assert time.monotonic() - start < 2
    release.set()


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (401, "note"), (404, "note"), (500, "note")])
def test_a_tracking_server_that_answers(monkeypatch, http_server, status, level):
    http_server.status = status
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:s3%40cret@127.0.0.1:{http_server.server_port}/mlflow/")
    finding = only(services._mlflow())
    assert finding.level == level
    assert "reachable" in finding.value
    assert http_server.seen == [("/mlflow/health", "Basic YWRhOnMzQGNyZXQ=")]


def test_a_reachable_ray_head(monkeypatch, silent_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
    assert only(services._ray()).level == "ok"


def test_a_probe_that_raises_is_one_finding(monkeypatch):
    def broken():
        raise RuntimeError("no driver at http://ada:s3cret@host")

    monkeypatch.setattr(examination, "PROBES", (("GPUs", broken), ("fine", lambda: [Finding("fine", "yes")])))
    first, second = examine()
    assert first == Finding(
        "GPUs", "RuntimeError: no driver at http://***@host", "problem", "This could not be examined."
    )
    assert second.value == "yes"


def test_the_table_is_ascii_on_every_console():
    table = render(
        [
            Finding("disk", "/d\u00e9p\u00f4t/\u6570\u636e\x1b[31m\r\n\udcff", "note", "Use \u2192 this."),
            Finding("x", ""),
        ]
    )
    table.encode("gbk")
    assert re.fullmatch(r"[ -~\n]*", table)
    assert r"/d\xe9p\xf4t/\u6570\u636e\x1b[31m" in table
    assert table.endswith("0 problems, 1 note")


def test_long_values_wrap_under_their_column():
    lines = render([Finding("GPU 0", "word " * 60, "ok", "Do this. " * 30)]).splitlines()
    assert max(map(len, lines)) <= findings.LINE_WIDTH
    assert lines[1].startswith(" " * len("problem  GPU 0  ") + "word")


def test_a_token_that_others_can_read_is_noted(monkeypatch, tmp_path):
    token = tmp_path / "auth_token"
    token.write_text("secret-token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.chmod(stat.S_IRUSR | stat.S_IRGRP)
    assert only(services._ray_token()).level == "note"
    token.chmod(stat.S_IRUSR)
    finding = only(services._ray_token())
    assert finding.level == "ok"
    assert "secret-token" not in finding.value


def test_a_cluster_without_its_token_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert only(services._ray_token()).level == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.10:6379")
    assert only(services._ray_token()).level == "problem"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert only(services._ray_token()).level == "note"


def test_the_output_folder_need_not_exist_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "a" / "b"))
    finding = only(services._disk())
    assert str(tmp_path / "a" / "b") in finding.value
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("encoding", "level"), [("utf-8", "ok"), ("gbk", "note"), ("ascii", "note"), (None, "note")])
def test_consoles(monkeypatch, encoding, level):
    class Console:
        pass

    console = Console()
    console.encoding = encoding
    monkeypatch.setattr(services.sys, "stdout", console)
    assert only(services._console()).level == level


def test_the_hub_is_asked_unless_a_flag_forbids_it(monkeypatch, http_server):
    address = f"http://127.0.0.1:{http_server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    http_server.status = 405  # an answer all the same
    assert only(services._hub()) == Finding("Hugging Face hub", f"{address}: reachable, HF_HUB_OFFLINE=0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    away = only(services._hub())
    assert away.level == "note"
    assert "http://127.0.0.1:9: not reachable" in away.value
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(services._hub()).value == "offline, HF_HUB_OFFLINE=1"


def test_gpus_that_torch_cannot_use_are_a_problem(monkeypatch):
    import torch

    seen = [hardware.GpuFacts("NVIDIA L4", 22.5, 22.0, (8, 9)), hardware.GpuFacts("NVIDIA L4", 22.5, 3.0, (8, 9))]
    monkeypatch.setattr(hardware, "_gpus_from_driver", lambda: ("580.1", seen))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    free, occupied, usable = hardware._gpus()
    assert free == Finding("GPU 0", "NVIDIA L4, 22.5 GiB, 22.0 GiB free, compute capability 8.9, driver 580.1")
    assert occupied.level == "note"
    assert (usable.value, usable.level) == ("0 of 2", "problem")


@pytest.mark.parametrize(
    ("driver", "built", "words"),
    [
        (13000, None, "pip install --force-reinstall torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"),
        (13020, None, "whl/cu130"),
        (12080, None, "whl/cu128"),
        (12070, None, "whl/cu126"),
        (12020, None, "This driver is for CUDA 12.2; torch needs 12.6 or later: update it."),
        (13000, "13.0", "finds no GPU"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_comes_with_the_line_that_installs_one(driver, built, words, monkeypatch):
    import pynvml
    import torch

    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", lambda: driver)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", built)
    assert words in hardware._cuda_build()
