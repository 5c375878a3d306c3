"""With a proxy in the environment: servers of this machine are reached without it, others by it, and it is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ingest import proxies
from ingest.emulator import EmbeddedServer
from ingest.errors import UnreachableError
from ingest.stores import StoreConfig, open_store
from ingest.stores.gcs_clients import close_clients
from tests.forward_proxy import forward_proxy
from train.job_cluster import JobError, connect

from .train.fake_dashboard import fake_dashboard

VARIABLES = [f"{kind}_{word}" for kind in ("http", "https", "all", "no") for word in ("proxy",)]
QUICK = StoreConfig(transport="direct", retry_refused_s=0.05, retry_deadline_s=1, retry_first_s=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without a proxy, and with clients of its own; put the variables back."""
    for name in VARIABLES:
        for each in (name, name.upper()):
            monkeypatch.setenv(each, "")  # notes what to put back, if the code under test sets it
            monkeypatch.delenv(each)
    close_clients()
    yield
    close_clients()


@pytest.fixture
def dead() -> Iterator[str]:
    """A proxy where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://me:h1dden@127.0.0.1:{unused.getsockname()[1]}"


EVERYTHING = """
import os, sys
from ingest.emulator import EmbeddedServer
from ingest.stores import StoreConfig, open_store
with EmbeddedServer() as server:
    os.environ.update(server.env())
    server.create_bucket("bucket")
    for transport in ("direct", "compose"):
        store = open_store("gs://bucket/x", StoreConfig(transport=transport, fast_listing_above=3, retry_deadline_s=20))
        for number in range(6):
            store.put(f"{transport}{number}", bytes([number]))
        from ingest.listing import list_objects
        objects = [meta for meta in list_objects(store) if meta.name.startswith(transport)]
        assert store.fetch(objects) == [bytes([number]) for number in range(6)]
    from ingest.stores.fast_listing import fast_list_objects
    assert len(fast_list_objects(bucket="bucket", prefix="x/", project=None, processes=2, timeout_s=100).sizes) == 12
print("read")
"""


@pytest.mark.parametrize("names", [("http_proxy", "https_proxy"), ("HTTP_PROXY",), ("ALL_PROXY",)])
def test_the_embedded_server_is_started_listed_and_read_past_a_dead_proxy(names: tuple[str, ...], dead: str) -> None:
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env |= dict.fromkeys(names, dead) | {"NO_PROXY": "example.org"}
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], env=env, capture_output=True, text=True, check=False, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_server_elsewhere_is_listed_and_read_by_the_proxy(
    name: str, gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forward_proxy(gcs_server.url) as proxy:
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.test:4443")
        store = open_store(f"gs://{bucket}", QUICK)
        store.put("x", b"body")
        proxy.hosts.clear()
        objects = list(store.list())
        listed = len(proxy.hosts)
        assert store.fetch(objects) == [b"body"]
        assert 0 < listed < len(proxy.hosts)
        assert set(proxy.hosts) == {"storage.test:4443"}
        close_clients()


def test_the_users_own_no_proxy_is_honoured(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", dead)
    monkeypatch.setenv("NO_PROXY", "storage.test")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.test:4443")
    with pytest.raises(UnreachableError) as caught:
        list(open_store("gs://bucket", QUICK).list())
    assert "proxy" not in str(caught.value)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("way", ["list", "read"])
def test_a_message_names_the_proxy_without_its_password(
    way: str, name: str, dead: str, gcs_server: EmbeddedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"gs://{bucket}", QUICK)
    store.put("x", b"body")
    objects = list(store.list())
    monkeypatch.setenv(name, dead)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.test:4443")
    with pytest.raises(UnreachableError) as caught:
        list(store.list()) if way == "list" else store.fetch(objects)
    address = dead.rpartition("@")[2]
    assert f"storage.test:4443 takes no connection through the proxy http://{address} (see {name}" in str(caught.value)
    assert "h1dden" not in str(caught.value)


def test_a_dashboard_of_this_machine_is_reached_past_a_dead_proxy_and_another_names_it(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("http_proxy", dead)
    with fake_dashboard() as server:
        assert connect(server.url).get_address() == server.url
    with pytest.raises(JobError, match=r"through the proxy http://127\.0\.0\.1:\d+ \(see http_proxy") as caught:
        connect("http://head.test:8265")
    assert "h1dden" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"http_proxy": "p"}, ["localhost", "127.0.0.1", "127.0.0.0/8", "::1", "[::1]"]),
        ({"ALL_PROXY": "p", "NO_PROXY": "a, b"}, ["a", "b", "localhost", "127.0.0.1"]),
        ({"HTTPS_PROXY": "p", "no_proxy": "a"}, ["a", "localhost"]),
        ({"http_proxy": "p", "no_proxy": "127.0.0.1"}, ["127.0.0.1", "localhost", "::1"]),
        ({"http_proxy": "p", "NO_PROXY": "*"}, ["*"]),
    ],
)
def test_loopback_addresses_join_what_the_user_excludes(
    given: dict[str, str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    proxies.bypass_for_loopback()
    proxies.bypass_for_loopback()
    if given.get("NO_PROXY") != "*":
        for name in ("no_proxy", "NO_PROXY"):
            entries = os.environ[name].split(",")
            assert set(wanted) <= set(entries)
            assert len(set(entries)) == len(entries)
    for host in ("localhost", "127.0.0.1", "127.3.2.1", "[::1]"):
        assert proxies.proxy_of(f"http://{host}:80/x") is None


def test_without_a_proxy_nothing_is_set() -> None:
    proxies.bypass_for_loopback()
    assert "no_proxy" not in os.environ
    assert "NO_PROXY" not in os.environ
    assert proxies.through("https://storage.googleapis.com") == ""
