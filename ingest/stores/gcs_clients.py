"""The clients and thread pools of this process: made on first use, never carried through a fork or a pickle."""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit

import google.auth
from google.api_core.client_info import ClientInfo
from google.cloud import storage

from ..proxies import bypass_for_loopback, proxy_for_curl, through
from .base import StoreConfig
from .curl import CurlPool

T = TypeVar("T")

# Without it google-cloud-storage 3 asks for the bucket's metadata from a background thread at each client's start.
_NO_BUCKET_METADATA = "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"
_USER_AGENT = "voxflux dataflux/1.0"
_TOKEN_TIMEOUT_S = 30.0


class _Cache:
    """What was made in this process, by key. Thread-safe; empty in a forked child."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start empty, with a lock of its own: what was inherited through a fork is not ours to close."""
        self._lock = threading.RLock()
        self._made: dict[tuple[object, ...], Any] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """The one thing of that key."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return cast(T, self._made[key])

    def replace(self, key: tuple[object, ...], make: Callable[[], T], old: T) -> T:
        """Another one in the place of `old`, if that is not done already."""
        with self._lock:
            if self._made.get(key) is old:
                self._made[key] = make()
            return self.get(key, make)

    def drain(self) -> list[Any]:
        """Take everything out."""
        with self._lock:
            made, self._made = list(self._made.values()), {}
            return made


_CACHE = _Cache()
os.register_at_fork(after_in_child=_CACHE.forget)


def emulator_url() -> str | None:
    """Where STORAGE_EMULATOR_HOST points, with its scheme; None when it is not set."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not host:
        return None
    return host if "://" in host else f"http://{host}"


def server_name() -> str:
    """Host and port of the server in use, for messages."""
    return urlsplit(_server_url()).netloc


def through_proxy() -> str:
    """Words that name the proxy on the way to the server, for messages; nothing where there is none."""
    return through(_server_url())


def _server_url() -> str:
    return emulator_url() or "https://storage.googleapis.com"


def google_client(config: StoreConfig) -> storage.Client:
    """This process's google-cloud-storage client."""
    url = emulator_url()

    def make() -> storage.Client:
        os.environ.setdefault(_NO_BUCKET_METADATA, "true")
        bypass_for_loopback()
        options = {"api_endpoint": url} if url else None
        info: Any = ClientInfo
        return storage.Client(project=config.project, client_info=info(user_agent=_USER_AGENT), client_options=options)

    return _CACHE.get(("google", config.project, url), make)


def google_blob(config: StoreConfig, bucket: str, key: str, generation: int | None = None) -> storage.Blob:
    """An object as google-cloud-storage sees it; touches no network but for credentials."""
    return google_client(config).bucket(bucket).blob(key, generation=generation)


def timeouts_s(config: StoreConfig) -> tuple[float, float]:
    """Connect and read time-outs, as google-cloud-storage takes them."""
    return (config.connect_timeout_s, config.read_timeout_s)


def curl_pool(config: StoreConfig, in_flight: int) -> CurlPool:
    """This process's connections for direct reads; what fails is tried again by our own policy."""
    proxy = proxy_for_curl(_server_url())

    def make() -> CurlPool:
        bypass_for_loopback()
        return CurlPool(
            in_flight,
            proxy=proxy,
            connect_timeout_s=config.connect_timeout_s,
            read_timeout_s=config.read_timeout_s,
            user_agent=_USER_AGENT,
        )

    key = ("curl", in_flight, config.connect_timeout_s, config.read_timeout_s, proxy)
    found = _CACHE.get(key, make)
    return _CACHE.replace(key, make, found) if found.closed else found


def object_url(bucket: str, key: str, generation: int | None) -> str:
    """Where the XML API has an object: https://cloud.google.com/storage/docs/request-endpoints (path-style)."""
    place = f"{_server_url()}/{quote(bucket)}/{quote(key, safe='/~')}"
    return place if generation is None else f"{place}?generation={generation}"


def authorization(timeout_s: float = _TOKEN_TIMEOUT_S) -> tuple[str, ...]:
    """The header that goes with a request; none for an emulator.

    Args:
        timeout_s: silence of the server that renews tokens after which it is given up.

    Raises:
        google.auth.exceptions.GoogleAuthError: no credentials, or they cannot be renewed.
    """
    if emulator_url():
        return ()
    tokens: _GoogleTokens = _CACHE.get(("tokens",), _GoogleTokens)
    return (f"Authorization: Bearer {tokens.current(timeout_s)}",)


def pool(kind: str, threads: int) -> ThreadPoolExecutor:
    """This process's thread pool for one kind of work: it bounds the requests in flight of all its stores."""
    return _CACHE.get(
        ("pool", kind, threads),
        lambda: ThreadPoolExecutor(threads, thread_name_prefix=f"voxflux-{kind}"),
    )


def close_clients() -> None:
    """Close every client and pool of this process; the next call makes new ones."""
    for made in _CACHE.drain():
        if isinstance(made, ThreadPoolExecutor):
            made.shutdown(cancel_futures=True)
        elif isinstance(made, CurlPool | storage.Client):
            made.close()


atexit.register(close_clients)


class _GoogleTokens:
    """Tokens of the application default credentials, renewed in time. Thread-safe."""

    def __init__(self) -> None:
        scope = "https://www.googleapis.com/auth/devstorage.read_write"
        self._credentials: Any = google.auth.default(scopes=[scope])[0]
        self._lock = threading.Lock()

    def current(self, timeout_s: float) -> str:
        """A token that is valid now."""
        from google.auth.transport.requests import Request

        with self._lock:
            if not self._credentials.valid:
                # google-auth's own time-out of 120 s would take the whole of our retry deadline for one try.
                self._credentials.refresh(functools.partial(Request(), timeout=timeout_s))
            return str(self._credentials.token)
