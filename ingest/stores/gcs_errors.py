"""What google-cloud-storage, google-auth, requests and obstore raise, turned into our errors."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable
from typing import TypeVar

import google.api_core.exceptions
import google.auth.exceptions
import google.cloud.storage.exceptions
import obstore.exceptions
import requests.exceptions
import urllib3.exceptions

from ..errors import CredentialsError, PermissionDeniedError, StoreError
from .base import StoreConfig
from .gcs_clients import server_name
from .retry import PASSING_STATUSES, PassingError, with_retries

T = TypeVar("T")

_FOREIGN = (
    google.api_core.exceptions.GoogleAPICallError,
    google.auth.exceptions.GoogleAuthError,
    google.cloud.storage.exceptions.InvalidResponse,
    google.cloud.storage.exceptions.DataCorruption,
    requests.exceptions.RequestException,
    urllib3.exceptions.HTTPError,
    obstore.exceptions.BaseError,
    OSError,  # obstore's 404 is a FileNotFoundError; sockets' own errors
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
    if isinstance(error, obstore.exceptions.UnauthenticatedError):
        return 401
    if isinstance(error, obstore.exceptions.PermissionDeniedError):
        return 403
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, obstore.exceptions.PreconditionError):
        return 412
    if isinstance(error, obstore.exceptions.BaseError):
        found = re.search(r"non-2xx status code: (\d{3})", str(error))
        return int(found.group(1)) if found else None
    return None


def _retry_after_s(error: Exception) -> float | None:
    # obstore hands back no headers, so its Retry-After cannot be known.
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    when = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else None


def _detail_of(error: Exception) -> str:
    return str(error).partition("\n\nDebug source")[0].strip() or type(error).__name__


def _connection_kind(error: Exception) -> str:
    text = str(error)
    if isinstance(error, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.IncompleteRead):
        return "cut"
    if isinstance(error, obstore.exceptions.BaseError):
        if "kind: Timeout" in text or "TimedOut" in text:
            return "timeout"
        if any(sign in text for sign in ("ConnectionRefused", "dns error", "HostUnreachable")):
            return "refused"
        return "cut" if "kind: Body" in text or "kind: Decode" in text else "reset"
    refused = ("Connection refused", "NameResolutionError", "Name or service not known", "No route to host")
    if any(sign in text for sign in refused):
        return "refused"
    timeouts = (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    return "timeout" if isinstance(error, timeouts) or "timed out" in text else "reset"
