"""The token by which Ray's processes know each other: in memory for a Ray of ours, the cluster's own otherwise."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError


def check_token_path() -> None:
    """Check that the token's file is found from every folder: Ray's workers run in another one than we do.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH is relative, or names no file that can be read.
    """
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not given or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(given)
    if not path.is_absolute():
        raise ConfigError(
            f"expected an absolute path in RAY_AUTH_TOKEN_PATH, because Ray's workers run in other folders, found "
            f"{given!r}; set RAY_AUTH_TOKEN_PATH={path.absolute()}, for the head as well as here"
        )
    try:
        found = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"expected the cluster's token in RAY_AUTH_TOKEN_PATH={given}, found: {error.strerror}; give the file that "
            "the head was started with"
        ) from error
    if not found:
        raise ConfigError(
            f"expected the cluster's token in RAY_AUTH_TOKEN_PATH={given}, found an empty file; give the file that the "
            "head was started with"
        )


@contextlib.contextmanager
def token_of_own_ray() -> Iterator[dict[str, str]]:
    """Variables that give a Ray of ours a token without a file, while it starts and runs.

    Without one, Ray 2.60 makes a token and writes it to ~/.ray/auth_token, which needs a home that can be written, and
    leaves it readable for everybody. A token that the user has is kept, so that Ray's own commands reach the session.

    Yields:
        What to set in the environment while Ray starts; its processes inherit it.
    """
    from ray.exceptions import AuthenticationError

    from .ray_compat import token_loader

    loader = token_loader()
    loader.reset_cache()
    variables = {}
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        has = False
        if os.environ.get("RAY_AUTH_TOKEN") or not path or Path(path).is_absolute():
            with contextlib.suppress(AuthenticationError):
                has = loader.has_token(ignore_auth_mode=True)
        if not has:
            variables = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    loader.reset_cache()
    try:
        yield variables
    finally:
        loader.reset_cache()  # the next session of this process has another token
