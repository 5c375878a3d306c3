"""Proxies of the environment: servers on this machine are reached without them, and messages name the one in use."""

from __future__ import annotations

import os
import re
import urllib.request
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "[::1]")
"""Entries of NO_PROXY; not every library reads the one with a mask."""

_NAMES = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")

# For servers of our own, whatever the environment says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def bypass_for_loopback() -> None:
    """Name the loopback addresses in NO_PROXY, if this process has a proxy: no proxy can reach them for us.

    What the user's own NO_PROXY names stays. Processes that are started from now on inherit the variable. It changes
    nothing if it was called before.
    """
    if not any(_variable_of(name) for name in _PROXIES):
        return
    given = [os.environ.get(name, "").strip() for name in _NAMES]
    for name, value in zip(_NAMES, (given[0] or given[1], given[1] or given[0]), strict=True):
        entries = [entry for entry in re.split(r"[,\s]+", value) if entry]
        missing = [entry for entry in LOOPBACK if entry not in entries]
        if missing and value != "*":
            os.environ[name] = ",".join([*entries, *missing])


def proxy_of(url: str) -> tuple[str, str] | None:
    """Return the variable that names a proxy for a URL, and the proxy without its login; None if there is none."""
    from requests.utils import should_bypass_proxies

    variable = _variable_of(f"{urlsplit(url).scheme}_proxy") or _variable_of("all_proxy")
    if variable is None or should_bypass_proxies(url, no_proxy=None):
        return None
    return variable, re.sub(r"^([\w+.-]+://)?[^/]*@", r"\1", os.environ[variable].strip())


def through(url: str) -> str:
    """Return words that name the proxy on the way to a URL, for messages; nothing if there is none."""
    found = proxy_of(url)
    return f" through the proxy {found[1]} (see {found[0]} and NO_PROXY)" if found else ""


def proxy_for_curl(url: str) -> str | None:
    """Return the proxy that libcurl must be told of: it does not read HTTP_PROXY in upper case; None otherwise."""
    variable = _variable_of("http_proxy")
    return os.environ[variable].strip() if variable == "HTTP_PROXY" and url.startswith("http://") else None


def _variable_of(name: str) -> str | None:
    """Return the name of the variable that is set, in lower case or in upper case."""
    return next((each for each in (name, name.upper()) if os.environ.get(each, "").strip()), None)
