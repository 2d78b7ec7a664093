"""A folder in a bucket, on a server that speaks S3: what is written is read again, and every refusal is one error."""

from __future__ import annotations

import socket
import sys

import bucket
import pytest

from ray_peft import cli
from ray_peft.errors import StorageError
from ray_peft.store import remote
from ray_peft.store.mirror import Mirror
from ray_peft.store.remote import Remote


@pytest.fixture(scope="module")
def server():
    with bucket.server() as address:
        yield address


@pytest.fixture
def s3(server, monkeypatch) -> str:
    for name, value in bucket.KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the credentials that it was made with
    return f"s3://{bucket.new_bucket(server)}/runs/first"


def test_a_bucket_holds_what_was_written_and_no_more(s3, server, tmp_path):
    place = Remote(s3)
    assert place.versions() == {}
    assert place.read("a") is None
    (tmp_path / "file").write_bytes(b"x" * 100)
    version = place.put(tmp_path / "file", "trials/t/file")
    assert place.create("a", b"1")
    assert not place.create("a", b"2")
    assert place.read("a") == b"1"
    assert place.versions() == {"trials/t/file": version, "a": place.put(b"1", "a")}
    assert version.startswith("100:")
    assert place.put(b"y" * 100, "trials/t/file") != version
    place.get("trials/t/file", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == b"y" * 100
    place.remove("a")
    place.remove("a")
    name = s3.split("/")[2]
    assert bucket.keys(server, name) == ["runs/first/trials/t/file"]


def test_a_key_that_leads_out_of_the_folder_is_none_of_a_sweep(s3, server, tmp_path):
    name = s3.split("/")[2]
    for key in ("../outside", "trials/../../outside", "..\\outside", "trials/t/row", "/outside"):
        bucket.client(server).put_object(Bucket=name, Key=f"runs/first/{key}", Body=b"1")
    Mirror(Remote(s3), tmp_path / "a" / "b").fetch()
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == ["a/b/.mirror.jsonl", "a/b/trials/t/row"]


def refused(url: str, capsys) -> str:
    """What the command says of a URL that cannot be used."""
    assert cli.main(["sweep", "no-such-space.yaml", "--out", url]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1, shown.err
    assert not shown.out
    assert bucket.KEYS["AWS_SECRET_ACCESS_KEY"] not in shown.err
    return shown.err.removeprefix(f"error: {url}: ")


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", str(tmp_path / "outputs"))


def test_a_bucket_that_is_not_there(s3, server, capsys):
    says = refused("s3://no-such-bucket/first", capsys)
    assert says.startswith("cannot be written: The specified bucket does not exist; check the URL"), says
    assert "no-such-bucket" not in [entry["Name"] for entry in bucket.client(server).list_buckets()["Buckets"]]


def test_no_credentials(s3, capsys, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    says = refused(s3, capsys)
    assert "Unable to locate credentials" in says
    assert "credentials are taken as the AWS command line takes them: AWS_ACCESS_KEY_ID and AWS_SECRET_" in says


def test_a_server_that_is_not_there(s3, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the answer is the same after five
    assert "http://127.0.0.1:9" in refused(s3, capsys)


def test_a_server_that_takes_connections_and_never_answers(s3, capsys, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert refused(s3, capsys).startswith("does not answer within 0.5 s; check the URL")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/first", "gs needs a package that is not installed: pip install gcsfs"),
        ("nowhere://bucket/first", "cannot be used: Protocol not known: nowhere"),
        ("memory://", "names no folder; add one, such as memory:/sweep"),
    ],
)
def test_a_url_that_nothing_can_open(capsys, monkeypatch, url, says):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert refused(url, capsys).startswith(says)


def test_a_password_is_not_shown():
    with pytest.raises(StorageError) as refusal:
        Remote("nowhere://me:pass-word@host/sweep")
    assert "pass-word" not in str(refusal.value)
    assert str(refusal.value).startswith("nowhere://***@host/sweep: ")


def test_outputs_of_this_machine_are_a_folder(capsys, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_OUTPUTS", "s3://bucket/outputs")
    assert cli.main(["report", "s3://bucket/first"]) == 2
    assert "RAY_PEFT_OUTPUTS=s3://bucket/outputs: must be a folder; --out may be a URL" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["watch"], ["ctl"], ["clean"], ["ui", "--live"]])
def test_commands_of_a_machine_that_has_no_copy_say_how_to_get_one(capsys, command):
    more = ["list"] if command == ["ctl"] else []
    assert cli.main([*command, "s3://bucket/first", *more]) == 2
    says = "s3://bucket/first: this machine has no copy of it; `ray-peft report s3://bucket/first` makes one in "
    assert says in capsys.readouterr().err
