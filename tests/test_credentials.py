"""Credentials that cannot be renewed for now are asked for again; those that are refused end the call at once."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable

import google.auth.exceptions
import google.auth.transport.requests
import google.oauth2.credentials
import pytest
import requests.exceptions
from google.auth import impersonated_credentials
from google.auth.compute_engine import credentials as compute_credentials

from ingest.errors import CredentialsError, UnreachableError
from ingest.stores import StoreConfig
from ingest.stores.gcs_clients import _GoogleTokens
from ingest.stores.gcs_errors import call, translated
from ingest.stores.retry import PassingError

from .web_server import WebServer

QUICK = StoreConfig(retry_first_s=0.001, retry_longest_s=0.002)
Says = list[tuple[int, str]]


class TokenServer(WebServer):
    """Gives the answers of a list, one after the other, and the last of them from then on."""

    def __init__(self, answers: Says) -> None:
        self.requests = 0
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                with lock:
                    status, body = answers[min(outer.requests, len(answers) - 1)]
                    outer.requests += 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(Handler)


def impersonated(url: str) -> impersonated_credentials.Credentials:
    source = google.oauth2.credentials.Credentials("a-token")
    return impersonated_credentials.Credentials(
        source, "someone@example.iam.gserviceaccount.com", ["scope"], iam_endpoint_override=url
    )


def user(url: str) -> google.oauth2.credentials.Credentials:
    return google.oauth2.credentials.Credentials(
        None, refresh_token="r", token_uri=url, client_id="c", client_secret="s"
    )


IAM_TOKEN = json.dumps({"accessToken": "good", "expireTime": "2999-01-01T00:00:00Z"})
USER_TOKEN = json.dumps({"access_token": "good", "expires_in": 3600})
BUSY = json.dumps({"error": {"code": 503, "status": "UNAVAILABLE", "message": "try later"}})
MANY = json.dumps({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "slow down"}})
DENIED = json.dumps({"error": {"code": 403, "status": "PERMISSION_DENIED", "message": "no"}})
GRANT = json.dumps({"error": "invalid_grant", "error_description": "Token has been revoked."})
PAGE = "<html><title>Error 502 (Server Error)!!1</title></html>"


@pytest.fixture
def no_google_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """google-auth waits a second between tries of its own."""
    monkeypatch.setattr("google.auth._exponential_backoff.time.sleep", lambda _seconds: None)


def renewed(make: Callable[[str], object], url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token as direct reads get it, under the retry policy."""
    monkeypatch.setattr("google.auth.default", lambda scopes: (make(url), None))
    tokens = _GoogleTokens()
    return call(QUICK, lambda: tokens.current(5.0), what="asking for a token", permission="storage.objects.get")


@pytest.mark.usefixtures("no_google_backoff")
@pytest.mark.parametrize(
    ("make", "first", "token"),
    [
        (impersonated, (503, BUSY), IAM_TOKEN),
        (impersonated, (429, MANY), IAM_TOKEN),
        (impersonated, (502, PAGE), IAM_TOKEN),
        (user, (502, PAGE), USER_TOKEN),
        (user, (400, json.dumps({"error": "server_error"})), USER_TOKEN),
    ],
)
def test_a_token_server_that_fails_for_now_is_asked_again(
    make: Callable[[str], object], first: tuple[int, str], token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenServer([first] * 4 + [(200, token)]) as server:
        assert renewed(make, server.url, monkeypatch) == "good"


@pytest.mark.parametrize(("make", "answer"), [(impersonated, (403, DENIED)), (user, (400, GRANT))])
def test_a_refusal_to_renew_ends_the_call_at_once(
    make: Callable[[str], object], answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TokenServer([answer]) as server:
        with pytest.raises(CredentialsError, match="renew them"):
            renewed(make, server.url, monkeypatch)
        assert server.requests == 1


class _Answer:
    """What google-auth takes for a metadata server's answer."""

    headers = {"content-type": "application/json"}  # noqa: RUF012  never written

    def __init__(self, status: int) -> None:
        self.status = status
        self.data = b"{}"


@pytest.mark.usefixtures("no_google_backoff")
@pytest.mark.parametrize(("status", "kind"), [(503, PassingError), (502, PassingError), (404, CredentialsError)])
def test_a_metadata_servers_failure_passes_and_its_refusal_does_not(status: int, kind: type[Exception]) -> None:
    with pytest.raises(google.auth.exceptions.RefreshError) as raised:
        compute_credentials.Credentials().refresh(lambda **_: _Answer(status))
    assert isinstance(translated(raised.value, "reading gs://b/x", "storage.objects.get"), kind)


def test_a_time_out_of_a_host_whose_name_holds_credentials_is_no_lack_of_credentials() -> None:
    cause = requests.exceptions.ReadTimeout("HTTPSConnectionPool(host='iamcredentials.googleapis.com'): timed out")
    error = google.auth.exceptions.TransportError(cause)
    error.__cause__ = cause

    def fail() -> None:
        raise error

    with pytest.raises(UnreachableError, match="iamcredentials"):
        call(StoreConfig(retry_first_s=0.001, retry_deadline_s=0.05), fail, what="reading gs://b/x", permission="p")


def test_missing_default_credentials_end_the_call_at_once() -> None:
    error = google.auth.exceptions.DefaultCredentialsError("Your default credentials were not found.")
    assert isinstance(translated(error, "reading gs://b/x", "storage.objects.get"), CredentialsError)
