"""A way to the embedded server's objects that is not the store's: plain HTTP by the standard library."""

from __future__ import annotations

import json
import urllib.request
from urllib.parse import quote

from ingest.stores.base import Store


class GCSPlace:
    """A store under test, and raw access to its bucket."""

    def __init__(self, store: Store, server_url: str) -> None:
        self.store = store
        self._url = server_url
        self._bucket, _, self._prefix = store.uri.removeprefix("gs://").partition("/")

    def write(
        self, name: str, data: bytes, storage_class: str | None = None, content_encoding: str | None = None
    ) -> None:
        """Write one object."""
        key = quote(self._prefix + name, safe="")
        if storage_class is None and content_encoding is None:
            self._send("POST", f"/upload/storage/v1/b/{self._bucket}/o?uploadType=media&name={key}", data)
            return
        fields = {"storageClass": storage_class, "contentEncoding": content_encoding}
        given = {field: value for field, value in fields.items() if value is not None}
        about = json.dumps({"name": self._prefix + name, **given}).encode()
        body = b"--x\r\nContent-Type: application/json\r\n\r\n" + about
        body += b"\r\n--x\r\nContent-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--x--\r\n"
        path = f"/upload/storage/v1/b/{self._bucket}/o?uploadType=multipart"
        self._send("POST", path, body, "multipart/related; boundary=x")

    def read(self, name: str) -> bytes:
        """Read one object."""
        return self._send("GET", self._path(name) + "?alt=media")

    def delete(self, name: str) -> None:
        """Delete one object."""
        self._send("DELETE", self._path(name))

    def keys(self) -> list[str]:
        """All keys of the bucket, whatever the store's prefix."""
        answer = json.loads(self._send("GET", f"/storage/v1/b/{self._bucket}/o"))
        return [item["name"] for item in answer.get("items", [])]

    def _path(self, name: str) -> str:
        return f"/storage/v1/b/{self._bucket}/o/{quote(self._prefix + name, safe='')}"

    def _send(self, method: str, path: str, data: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
        request = urllib.request.Request(self._url + path, data=data, method=method, headers={"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())
