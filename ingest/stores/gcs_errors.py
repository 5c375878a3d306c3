"""What google-cloud-storage, google-auth and requests raise, and what servers answer, turned into our errors."""

from __future__ import annotations

import email.utils
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
from .gcs_clients import server_name
from .retry import PASSING_STATUSES, PassingError, with_retries

T = TypeVar("T")


class RefusalError(Exception):
    """An HTTP answer that is no success, by libcurl; never leaves the stores."""

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
    OSError,  # sockets' own errors
)


class AbsentError(StoreError):
    """A 404, before it is known whether the object or its bucket is missing; never leaves the stores."""


def call(
    config: StoreConfig,
    action: Callable[[], T],
    *,
    what: str,
    permission: str,
    tries: int | None = None,
) -> T:
    """Do one request under the retry policy, with its errors made ours.

    Args:
        config: the retry policy.
        action: sends the request once, with the library's own retries off.
        what: the request in words, with the full URI.
        permission: the IAM permission that it needs, to name on a 403.
        tries: at most so many; None goes by the deadline alone.

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
    """The error of ours that `error` stands for."""
    status = status_of(error)
    detail = _detail_of(error)
    if status is not None:
        return _of_status(status, what, permission, detail, _retry_after_s(error))
    if isinstance(error, google.auth.exceptions.DefaultCredentialsError) or "redential" in detail:
        return CredentialsError(
            f"{what}: expected Google credentials, found none ({detail}); run `gcloud auth application-default "
            f"login`, set GOOGLE_APPLICATION_CREDENTIALS, or set STORAGE_EMULATOR_HOST for a local server"
        )
    if isinstance(error, google.auth.exceptions.RefreshError) and not error.retryable:
        return _of_status(401, what, permission, detail, None)
    if isinstance(error, google.cloud.storage.exceptions.DataCorruption):
        return PassingError("checksum", detail)
    kind = _connection_kind(error)
    if kind == "refused":
        detail = f"{server_name()} takes no connection"
    return PassingError(kind, detail)


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
    """The HTTP status that a client's error stands for; None where it is of another kind."""
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
