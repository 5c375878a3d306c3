"""Places below a home folder: `~` and `~/…`."""

from __future__ import annotations

import os

from .errors import ConfigError


def expanded(place: str) -> str:
    """A local place with its `~` replaced by the home folder.

    Args:
        place: a path; one that begins with the `~NAME` of no user is taken literally.

    Raises:
        ConfigError: this user has no home folder.
    """
    found = os.path.expanduser(place)  # noqa: PTH111  Path.expanduser raises a bare RuntimeError
    if found.partition("/")[0] == "~":
        raise ConfigError(
            f"expected a home folder for {place}, found none: HOME is not set, and user {os.geteuid()} has no entry in "
            "the passwd file; set HOME, or give an absolute path"
        )
    return found
