"""Checks the address of a Ray cluster in seconds, where Ray itself waits for minutes or ends in an error of its own."""

from __future__ import annotations

import http.client
import os
import socket
import time

from .errors import ClusterError, ConfigError

CONNECT_S = 5.0
"""Seconds for one connection and for one answer."""

_FORM = "RAY_ADDRESS=HOST:PORT, where the head of a cluster listens (by default port 6379)"
_WITHOUT = "unset RAY_ADDRESS for a Ray of this machine's own"
# What opens an HTTP/2 connection, with empty settings (RFC 9113, 3.4): Ray's servers answer with their settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 4  # the type of the frame, in its fourth byte


def check_address(given: str) -> str:
    """Check that a Ray cluster listens at an address, and that this machine is a node of some cluster.

    Args:
        given: HOST:PORT, or `auto` for the cluster that runs on this machine.

    Returns:
        HOST:PORT.

    Raises:
        ConfigError: it is no such address.
        ClusterError: nothing, or something else than Ray, listens there; or it refuses our token.
    """
    address = found_here() if given == "auto" else given
    host, port = parsed(address)
    listens(host, port, address)
    if os.environ.get("RAY_USE_TLS") != "1":
        takes_token(host, port, address)
    _wait_for_raylet(address)
    return address


def parsed(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        ConfigError: it has none, or names another kind of address.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"expected {_FORM}, found {address}, an address of Ray Client: Ray Train does not run through it; "
            "run this on a node of the cluster with HOST:PORT, or use `voxflux submit --address http://HOST:8265`"
        )
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"expected {_FORM}, found {address}, as of a dashboard; give `voxflux submit --address {address}`, or "
            "run this on a node of the cluster with HOST:PORT"
        )
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    plain = host and not any(letter in host for letter in "/@ ") and (":" not in host or f"[{host}]" in address)
    if not colon or not plain or not port.isascii() or not port.isdigit() or not 1024 <= int(port) <= 65535:
        raise ConfigError(
            f"expected {_FORM}, found {address!r}; HOST is a name or an IP address, PORT is from 1024 to 65535; "
            f"correct it, or {_WITHOUT}"
        )
    return host, int(port)


def found_here() -> str:
    """The address of the cluster that runs on this machine, for RAY_ADDRESS=auto.

    Raises:
        ClusterError: there is none.
    """
    from .ray_compat import address_here

    try:
        return address_here()
    except ConnectionError as error:
        raise ClusterError(
            f"expected a Ray cluster that runs on this machine, as RAY_ADDRESS=auto says, found none; start one with "
            f"`ray start --head`, give RAY_ADDRESS=HOST:PORT, or {_WITHOUT}"
        ) from error


def listens(host: str, port: int, address: str) -> None:
    """Check that a server of Ray's kind listens there.

    Raises:
        ClusterError: nothing listens there, or something else.
    """
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            start = b"" if os.environ.get("RAY_USE_TLS") == "1" else _opening(connection)
    except OSError as error:
        raise ClusterError(
            f"expected a Ray cluster at RAY_ADDRESS={address}, found that nothing takes a connection there "
            f"({error.strerror or error}); start its head, check the address, or {_WITHOUT}"
        ) from error
    if os.environ.get("RAY_USE_TLS") == "1" or (len(start) > 3 and start[3] == _SETTINGS):
        return
    what = "an HTTP server" if start.startswith(b"HTTP/") else "a server of another kind"
    advice = "give the port of the head (by default 6379)"
    if _is_dashboard(host, port):
        what = "the dashboard of a Ray cluster"
        advice += f", or use `voxflux submit --address http://{address}`"
    raise ClusterError(f"expected a Ray cluster at RAY_ADDRESS={address}, found {what}; {advice}, or {_WITHOUT}")


def takes_token(host: str, port: int, address: str) -> None:
    """Ask the head one thing with our token, which Ray would do for a quarter of a minute, with a line a second.

    Raises:
        ClusterError: it wants another token, or one at all.
    """
    import grpc
    from ray.exceptions import AuthenticationError

    from .ray_compat import token_metadata

    shown = f"[{host}]" if ":" in host else host
    try:
        token = token_metadata()
        with grpc.insecure_channel(f"{shown}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            ask(b"", timeout=CONNECT_S, metadata=token)
    except AuthenticationError as error:  # there is none on this machine
        raise refused(address) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refused(address) from error
        # Anything else is for Ray to meet, and to say.


def refused(address: str) -> ClusterError:
    """The error of a cluster that wants another token, or one at all."""
    return ClusterError(
        f"expected to join the Ray cluster at RAY_ADDRESS={address}, found that it wants another token than ours, or "
        "that we have none; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (an absolute path) to "
        "the token that the head was started with"
    )


def _opening(connection: socket.socket) -> bytes:
    """The first bytes that a server answers to an HTTP/2 client; none if it answers nothing."""
    answer = b""
    try:
        connection.sendall(_PREFACE)
        while len(answer) < 9 and (piece := connection.recv(64)):
            answer += piece
    except OSError:  # reset, or silence: another kind of server
        return answer
    return answer


def _is_dashboard(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)  # goes through no proxy
    try:
        connection.request("GET", "/api/version")
        answer = connection.getresponse()
        body = answer.read(10_000)
        # With token authentication it first wants the token.
        return b"ray_version" in body or (answer.status in (401, 403) and b"authentication token" in body)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _wait_for_raylet(address: str) -> None:
    """Ray connects through a node of its own on this machine, for which it would wait for a minute.

    Raises:
        ClusterError: no node of any cluster runs here.
    """
    from .ray_compat import has_node_here

    deadline = time.monotonic() + CONNECT_S
    while not has_node_here():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"expected this machine to be a node of the cluster at RAY_ADDRESS={address}, found no node of Ray on "
                f"it; run this on a node, use `voxflux submit`, or join by `ray start --address={address}`"
            )
        time.sleep(0.2)
