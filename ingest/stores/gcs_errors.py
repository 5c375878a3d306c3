"""Turns errors of google-cloud-storage, google-auth and requests, and refusals of servers, into our errors."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable
from typing import TypeVar

import google.api_core.exceptions
import google.auth.exceptions
import google.cloud.storage.exceptions
import requests.exceptions
import urllib3.exceptions

from ..errors import CredentialsError, PermissionDeniedError, StoreError
from .base import StoreConfig
from .curl import Answer
from .gcs_clients import server_name, through_proxy
from .retry import PASSING_STATUSES, PassingError, with_retries

T = TypeVar("T")


class RefusalError(Exception):
    """An HTTP answer whose status is not one of success, to a request by libcurl. Never leaves the stores."""

    def __init__(self, answer: Answer) -> None:
        text = answer.body[:2000].decode("utf-8", "replace")
        message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
        super().__init__(" ".join((message.group(1) if message else text).split())[:300])
        self.status = answer.status
        self.retry_after = answer.retry_after


_FOREIGN = (
    google.api_core.exceptions.GoogleAPICallError,
    google.auth.exceptions.GoogleAuthError,
    google.cloud.storage.exceptions.InvalidResponse,
    google.cloud.storage.exceptions.DataCorruption,
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    RefusalError,
    OSError,  # errors of sockets
)


class AbsentError(StoreError):
    """A 404 of which it is not known yet whether the object or its bucket is missing. Never leaves the stores."""


def call(
    config: StoreConfig,
    action: Callable[[], T],
    *,
    what: str,
    permission: str,
    tries: int | None = None,
) -> T:
    """Send one request under the retry policy, and raise its errors as ours.

    Args:
        config: the retry policy.
        action: sends the request once, with the library's own retries off.
        what: the request in words with the full URI, for messages.
        permission: the IAM permission that the request needs, named in the message of a 403.
        tries: number of tries at most; None retries until the deadline.

    Raises:
        AbsentError: 404.
        CredentialsError, PermissionDeniedError, UnreachableError, CorruptObjectError: as named.
        StoreError: the server refused otherwise (400, 412, ...).
    """

    def attempt() -> T:
        try:
            return action()
        except _FOREIGN as error:
            raise translated(error, what, permission) from error

    return with_retries(config, attempt, what=what, tries=tries)


def translated(error: Exception, what: str, permission: str) -> StoreError | PassingError:
    """Return our error for an error of a library, or for a refusal."""
    status = status_of(error)
    detail = _detail_of(error)
    if status is not None:
        return _of_status(status, what, permission, detail, _retry_after_s(error))
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return _of_credentials(error, what, permission, detail)
    if isinstance(error, google.cloud.storage.exceptions.DataCorruption):
        return PassingError("checksum", detail)
    kind = _connection_kind(error)
    if kind == "refused":
        detail = f"{server_name()} takes no connection"
    return PassingError(kind, f"{detail}{through_proxy()}")


def _of_credentials(
    error: google.auth.exceptions.GoogleAuthError, what: str, permission: str, detail: str
) -> StoreError | PassingError:
    if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
        return CredentialsError(
            f"{what}: expected Google credentials, found none ({detail}); run `gcloud auth application-default "
            f"login`, set GOOGLE_APPLICATION_CREDENTIALS, or set STORAGE_EMULATOR_HOST for a local server"
        )
    if passes(error):
        return PassingError("token", f"no token for now: {detail}")
    return _of_status(401, what, permission, detail, None)


_PASSING_AUTH = (
    google.auth.exceptions.TransportError,
    google.auth.exceptions.TimeoutError,
    google.auth.exceptions.ResponseError,
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    TimeoutError,
    ConnectionError,
)
# https://www.rfc-editor.org/rfc/rfc6749#section-4.1.2.1, and Google's own
_PASSING_OAUTH = frozenset({"internal_failure", "server_error", "temporarily_unavailable"})


def passes(error: google.auth.exceptions.GoogleAuthError) -> bool:
    """Return whether asking for the token again may help: the token server was not reached, or it failed itself.

    google-auth does not tell this in one way. A metadata server's 503 arrives as a RefreshError; its cause and its
    first argument are a TransportError. A refusal by IAM has the body of the answer as its second argument, and no
    status. Only some paths set the flag `retryable`.
    """
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if getattr(current, "retryable", False):
            return True
        by_answer = _answer_passes(current) if isinstance(current, google.auth.exceptions.GoogleAuthError) else None
        if by_answer is not None:
            return by_answer
        if isinstance(current, _PASSING_AUTH):
            return True
        inner = current.args[0] if current.args and isinstance(current.args[0], BaseException) else None
        current = current.__cause__ or inner
    return False


def _answer_passes(error: google.auth.exceptions.GoogleAuthError) -> bool | None:
    """Return the same by the token server's answer that an error carries; None if it carries none that decides it."""
    answer = error.args[1] if len(error.args) > 1 else None
    status = getattr(answer, "status", None)
    if isinstance(status, int):
        return _status_passes(status)
    body = answer
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return True  # a token server refuses with JSON; any other text is a gateway's
    elif answer is None and error.args and isinstance(error.args[0], str) and error.args[0].lstrip().startswith("<"):
        return True  # also a gateway's page, which is the message itself here
    if not isinstance(body, dict):
        return None
    said = body.get("error")
    if isinstance(said, dict):
        return isinstance(said.get("code"), int) and _status_passes(said["code"])
    if said is None:
        return None
    return str(said) in _PASSING_OAUTH or str(body.get("error_description")) in _PASSING_OAUTH


def _status_passes(status: int) -> bool:
    return status in PASSING_STATUSES or status >= 500


def _of_status(
    status: int, what: str, permission: str, detail: str, retry_after_s: float | None
) -> StoreError | PassingError:
    if status in PASSING_STATUSES or status > 504:
        return PassingError(f"status-{status}", detail, retry_after_s)
    if status == 401:
        return CredentialsError(
            f"{what}: expected credentials that the server takes, found them refused (401: {detail}); renew them, "
            f"e.g. by `gcloud auth application-default login`"
        )
    if status == 403:
        return PermissionDeniedError(
            f"{what}: expected the permission {permission}, found it missing (403: {detail}); grant it to the "
            f"account in use, e.g. by a role that holds it"
        )
    if status == 404:
        return AbsentError(f"{what}: 404: {detail}")
    return StoreError(f"{what}: expected the server to accept the request, found status {status}: {detail}")


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of a client's error; None if the error is not an answer of the server."""
    if isinstance(error, google.api_core.exceptions.GoogleAPICallError):
        return int(error.code) if error.code is not None else None
    if isinstance(error, google.cloud.storage.exceptions.InvalidResponse):
        return int(error.response.status_code)
    if isinstance(error, RefusalError):
        return error.status
    return None


def _retry_after_s(error: Exception) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = error.retry_after if isinstance(error, RefusalError) else headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    when = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else None


def _detail_of(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _connection_kind(error: Exception) -> str:
    text = str(error)
    if isinstance(error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.IncompleteRead):
        return "cut"
    refused = ("Connection refused", "NameResolutionError", "Name or service not known", "No route to host")
    if any(sign in text for sign in refused):
        return "refused"
    timeouts = (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    return "timeout" if isinstance(error, timeouts) or "timed out" in text else "reset"
