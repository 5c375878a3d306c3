"""Keeps the password of an MLflow server out of all that a run writes, prints and sends."""

from __future__ import annotations

import dataclasses
import os
from urllib.parse import unquote

from ingest.errors import ConfigError

from .config import Recipe

NAME_VARIABLE, PASSWORD_VARIABLE = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def split_login(uri: str) -> tuple[str, str | None, str | None]:
    """Return a URI without its login, and the name and the password of that login.

    A login without a password, as in `http://NAME@HOST`, is left in the URI, and both others are None then.
    """
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    login, at, host = authority.rpartition("@")
    name, colon, password = login.partition(":")
    if not (separator and at and colon):
        return uri, None, None
    return f"{scheme}://{host}{slash}{path}", unquote(name), unquote(password)


def without_password(uri: str) -> str:
    """Return a URI without its login, if that has a password."""
    return split_login(uri)[0]


def recipe_without_password(recipe: Recipe) -> Recipe:
    """Return a recipe whose tracking URI has no password."""
    if recipe.trainer.mlflow is None:
        return recipe
    clean = without_password(recipe.trainer.mlflow)
    return dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, mlflow=clean))


def usable_uri(uri: str) -> str:
    """Return the URI to give to MLflow's client.

    The login of an HTTP server is moved into the variables that the client reads, because the client prints its URI in
    its own messages. A database's URI keeps its login, because nothing else tells it to the database's driver.
    """
    clean, name, password = split_login(uri)
    if not uri.startswith(("http://", "https://")) or name is None or password is None:
        return uri
    os.environ[NAME_VARIABLE], os.environ[PASSWORD_VARIABLE] = name, password
    return clean


def hidden(text: str, uri: str) -> str:
    """Return a message without the password of a URI."""
    clean, _, password = split_login(uri)
    text = text.replace(uri, clean)
    return text.replace(password, "***") if password else text


def check_no_password(recipe: Recipe) -> None:
    """Refuse a job whose recipe has a password: the cluster keeps the recipe, and its dashboard shows the environment.

    Raises:
        ConfigError: the tracking URI has one.
    """
    uri = recipe.trainer.mlflow
    if uri is not None and without_password(uri) != uri:
        raise ConfigError(
            f"expected --trainer.mlflow {without_password(uri)} for a job, found a login with a password in it, which "
            "everyone who sees the cluster could read; give the URI without it, and set "
            f"{NAME_VARIABLE} and {PASSWORD_VARIABLE} in the environment of the cluster's head, or by --env, which "
            "Ray's dashboard shows"
        )
