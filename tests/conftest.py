"""One embedded server for the whole test run, and a fresh bucket for each test that asks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from ingest.emulator import EmbeddedServer
from ingest.stores.gcs_clients import close_clients

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[EmbeddedServer]:
    """The server; STORAGE_EMULATOR_HOST points at it until the run ends."""
    with EmbeddedServer() as server:
        before = {name: os.environ.get(name) for name in server.env()}
        os.environ.update(server.env())
        yield server
        close_clients()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture
def bucket(gcs_server: EmbeddedServer) -> str:
    """The name of a new, empty bucket."""
    name = f"test-bucket-{next(_NUMBERS)}"
    gcs_server.create_bucket(name)
    return name
