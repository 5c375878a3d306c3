"""What RAY_ADDRESS may hold, and what is said of what it may not, within seconds."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from ingest import ray_address
from ingest.cluster import check_before_ray, starts_here
from ingest.errors import ClusterError, ConfigError
from ingest.ray_address import check_address, listens, parsed
from tests.train.fake_dashboard import fake_dashboard


@contextlib.contextmanager
def answering(start: bytes) -> Iterator[int]:
    """A server that answers any first bytes with these, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(5)
                        connection.recv(1000)
                        connection.sendall(start)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            done.set()
            thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    "given", ["garbage", "host:", ":6379", "host:port", "host:80", "host:99999", "a b:6379", "::1:6379", "u@h:6379"]
)
def test_an_address_that_is_none_is_refused_with_the_form_of_one(given):
    with pytest.raises(ConfigError, match=r"expected RAY_ADDRESS=HOST:PORT, .*unset RAY_ADDRESS") as error:
        parsed(given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize(
    ("given", "wanted"), [("head:6379", ("head", 6379)), ("10.0.0.1:1024", ("10.0.0.1", 1024)), ("[::1]:1", None)]
)
def test_host_and_port_of_an_address(given, wanted):
    if wanted is None:
        with pytest.raises(ConfigError):
            parsed(given)
        wanted, given = ("::1", 6379), "[::1]:6379"
    assert parsed(given) == wanted


def test_the_address_of_ray_client_is_refused_with_what_to_do_instead():
    with pytest.raises(ConfigError, match=r"an address of Ray Client: Ray Train does not run through it.*submit"):
        parsed("ray://head:10001")


def test_the_url_of_a_dashboard_is_refused_with_what_it_is_good_for():
    with pytest.raises(ConfigError, match="as of a dashboard; give `voxflux submit --address http://head:8265`"):
        parsed("http://head:8265")


def test_a_port_where_nothing_listens_is_said_to_take_no_connection():
    port = free_port()
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port}, found that nothing takes a connection.*refused"):
        check_address(f"127.0.0.1:{port}")


def test_a_host_that_has_no_address_is_said_to_take_no_connection():
    with pytest.raises(ClusterError, match="nothing takes a connection there"):
        check_address("no-such-host.invalid:6379")


def test_a_dashboard_s_port_is_recognised_by_asking_it():
    with fake_dashboard() as dashboard:
        port = dashboard.server_address[1]
        with pytest.raises(ClusterError, match=f"found the dashboard of .*submit --address http://127.0.0.1:{port}"):
            listens("127.0.0.1", port, f"127.0.0.1:{port}")
        dashboard.refusal = (401, "Unauthorized: Missing authentication token")
        with pytest.raises(ClusterError, match="found the dashboard of a Ray cluster"):
            listens("127.0.0.1", port, f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("start", "what"), [(b"HTTP/1.1 404 Not Found\r\n\r\n", "an HTTP server"), (b"SSH-2.0-x\r\n", "of another kind")]
)
def test_a_server_of_another_kind_is_told_from_ray_s(start, what):
    with answering(start) as port, pytest.raises(ClusterError, match=what):
        listens("127.0.0.1", port, f"127.0.0.1:{port}")


def test_a_server_that_says_nothing_is_given_up_after_a_moment(monkeypatch):
    monkeypatch.setattr(ray_address, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ClusterError, match="a server of another kind"):
            listens("127.0.0.1", port, f"127.0.0.1:{port}")


def test_a_server_of_grpc_is_taken_for_ray_s():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        listens("127.0.0.1", port, f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


def test_a_machine_on_which_no_node_of_ray_runs_is_told_where_to_run(monkeypatch):
    monkeypatch.setattr(ray_address, "CONNECT_S", 0.1)
    monkeypatch.setattr("ingest.ray_compat.find_node_ids", set)
    with answering(b"\0\0\0\4\0\0\0\0\0") as port, pytest.raises(ClusterError, match="found no node of Ray on it"):
        check_address(f"127.0.0.1:{port}")


def test_auto_without_a_cluster_on_this_machine_is_said(monkeypatch):
    def none(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to")

    monkeypatch.setattr("ingest.ray_compat.canonicalize_bootstrap_address", none)
    with pytest.raises(ClusterError, match=r"as RAY_ADDRESS=auto says, found none; .*unset RAY_ADDRESS"):
        check_address("auto")


@pytest.mark.parametrize(
    ("given", "here"), [(None, True), ("", True), ("local", True), ("auto", False), ("h:1", False)]
)
def test_a_ray_starts_here_unless_the_address_names_a_cluster(monkeypatch, given, here):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert starts_here() is here


def test_on_a_cluster_a_relative_token_path_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "./token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"expected an absolute path in RAY_AUTH_TOKEN_PATH.*found './token'; set"):
        check_before_ray()


class Head(grpc.GenericRpcHandler):
    """A head that answers every call to whoever has its token."""

    def __init__(self, token: str) -> None:
        self.token = token

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        token = dict(call.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if token != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize(
    ("mode", "ours", "taken"), [("token", "a" * 64, True), ("token", "b" * 64, False), ("disabled", "a" * 64, False)]
)
def test_a_token_that_the_head_does_not_take_is_said_at_once(mode, ours, taken):
    # In a process of its own: Ray reads the mode once.
    script = "import sys; from ingest.ray_address import takes_token; from ingest.errors import ClusterError\n"
    script += "try:\n    takes_token('127.0.0.1', int(sys.argv[1]), 'it')\n    print('taken')\n"
    script += "except ClusterError as error:\n    print(error)"
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head("a" * 64)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        env = os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": ours, "http_proxy": "http://127.0.0.1:9"}
        call = [sys.executable, "-c", script, str(port)]
        printed = subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout.strip()
    finally:
        server.stop(None).wait()
    assert (printed == "taken") is taken
    assert taken or "found that it wants another token than ours, or that we have none; set RAY_AUTH_MODE" in printed
