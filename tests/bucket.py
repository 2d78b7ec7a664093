"""A server that speaks S3, of moto's, in this process; its clients are real."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Start it; gives its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(address: str) -> str:
    """The name of a new, empty bucket."""
    name = f"b-{uuid.uuid4().hex}"
    client(address).create_bucket(Bucket=name)
    return name


def client(address: str) -> Any:
    """Amazon's own client."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def keys(address: str, bucket: str) -> list[str]:
    """The names of all objects in a bucket."""
    pages = client(address).get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [entry["Key"] for page in pages for entry in page.get("Contents", ())]
