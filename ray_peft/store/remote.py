"""A folder at a URL, such as s3://bucket/sweep: what is asked of fsspec, and one clear error where it refuses."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from ray_peft.errors import StorageError, first_line
from ray_peft.foundation.masking import mask_address

ANSWER_S = 60.0
"""What has not answered the first question by then is out of reach; some packages would try for half an hour."""
_URL = re.compile(r"[a-z][a-z0-9+.\-]+(::[a-z][a-z0-9+.\-]+)*://", re.I)
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "last_modified", "LastModified", "created")
"""Where file systems say which content a file has, or since when."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_CREDENTIALS = {
    "s3": "credentials are taken as the AWS command line takes them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE; AWS_ENDPOINT_URL names another server than Amazon's",
    "gs": "credentials are taken as gcloud takes them: GOOGLE_APPLICATION_CREDENTIALS",
}


def is_url(text: str) -> bool:
    """Whether a text names a place by a URL, and not a folder of this machine."""
    return _URL.match(text) is not None


class Remote:
    """The folder. Paths in it are relative, with `/`; what begins with a dot, at any level, is no file of a sweep."""

    def __init__(self, url: str) -> None:
        """Find the package that knows such URLs; nothing is asked of the network yet.

        Raises:
            StorageError: none does.
        """
        import fsspec.core

        self.shown = mask_address(url)
        """The URL without a password."""
        self._scheme = url.partition("://")[0].rpartition("::")[2].lower()
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(self._scheme)
            way = f"pip install {package}" if package else first_line(error)
            raise StorageError(f"{self.shown}: {self._scheme} needs a package that is not installed: {way}") from None
        except Exception as error:  # a scheme that nobody knows, or settings of a file system that are wrong
            raise StorageError(f"{self.shown}: cannot be used: {self._reason(error)}") from None
        self._root = str(root).rstrip("/")
        if not self._root.strip("/"):
            raise StorageError(f"{self.shown}: names no folder; add one, such as {self.shown.rstrip('/')}/sweep")
        self.at_once = 4 if self._fs.async_impl else 1
        """Calls that may be made at the same time."""

    def check(self) -> None:
        """Make sure that something answers there.

        Raises:
            StorageError: nothing does, or it refuses to be read.
        """
        refusals: list[StorageError] = []

        def ask() -> None:
            try:
                self.read(".ray_peft")
            except StorageError as error:
                refusals.append(error)

        asking = threading.Thread(target=ask, name="url", daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        if asking.is_alive():
            raise StorageError(f"{self.shown}: does not answer within {ANSWER_S:g} s; {self._way_out()}")
        if refusals:
            raise refusals[0]

    def versions(self) -> dict[str, str]:
        """The files there by their path, each with a text that changes with its content and begins with its size.

        Raises:
            StorageError: the URL cannot be read.
        """
        with self._trying("read"):
            self._fs.invalidate_cache()
            try:
                infos = self._fs.find(self._root, detail=True)
            except FileNotFoundError:  # nothing was written yet
                infos = {}
        versions = {}
        for name, info in infos.items():
            path = str(name).removeprefix(f"{self._root}/")
            # A key of an object store is any text: one may hold "..", and would lead out of a folder of this machine.
            hidden = any(part.startswith(".") or "\\" in part for part in path.split("/"))
            if info.get("type") == "file" and not hidden and str(PurePosixPath(path)) == path and path[0] != "/":
                versions[path] = _version(info)
        return versions

    def get(self, path: str, target: Path) -> None:
        """Copy a file from there to `target`, whole or not at all.

        Raises:
            StorageError: it cannot be read, or `target` cannot be written.
        """
        partial = target.with_name(f".{target.name}.tmp")
        with self._trying("read", path):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._at(path), str(partial))
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def put(self, source: Path | bytes, path: str) -> str:
        """Write a file, or bytes, there; returns its version.

        Raises:
            StorageError: it cannot be written.
        """
        with self._trying("written", path):
            at = self._at(path)
            self._make_parent(at)
            if isinstance(source, bytes):
                self._fs.pipe_file(at, source)
            else:
                self._fs.put_file(str(source), at)
            self._fs.invalidate_cache(self._fs._parent(at))
            return _version(self._fs.info(at))

    def create(self, path: str, content: bytes) -> bool:
        """Write a new file; false if it is there by now. Where a file system cannot tell, it is written all the same.

        Raises:
            StorageError: it cannot be written.
        """
        with self._trying("written"):
            at = self._at(path)
            self._make_parent(at)
            try:
                self._fs.pipe_file(at, content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError):
                self._fs.pipe_file(at, content)
            return True

    def read(self, path: str) -> bytes | None:
        """The content of a small file; None if it is not there.

        Raises:
            StorageError: the URL cannot be read.
        """
        with self._trying("read"):
            try:
                content: bytes = self._fs.cat_file(self._at(path))
            except FileNotFoundError:
                return None
            return content

    def remove(self, path: str) -> None:
        """Remove a file, if it is there.

        Raises:
            StorageError: it cannot be removed.
        """
        with self._trying("written", path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _make_parent(self, at: str) -> None:
        """Object stores have no folders, and a bucket that is not there is nothing to make by the way."""
        if not self._fs.async_impl:
            self._fs.makedirs(self._fs._parent(at), exist_ok=True)

    @contextlib.contextmanager
    def _trying(self, what: str, path: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every file system has errors of its own
            where = f"{self.shown.rstrip('/')}/{path}" if path else self.shown
            raise StorageError(f"{where}: cannot be {what}: {self._reason(error)}; {self._way_out()}") from None

    def _way_out(self) -> str:
        credentials = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(self._scheme, self._scheme))
        return "; ".join(filter(None, ("check the URL and what it needs to be reached", credentials)))

    def _reason(self, error: Exception) -> str:
        reason = mask_address(first_line(error))
        return reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"


def _version(info: Mapping[str, Any]) -> str:
    named = next((info[name] for name in _VERSIONS if info.get(name)), "")
    # The same time may be a number in a listing and a datetime elsewhere.
    return f"{int(info['size'] or 0)}:{named.timestamp() if isinstance(named, datetime) else named}"
