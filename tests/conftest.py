"""One embedded server for the whole test run, and a fresh bucket for each test that asks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import hypothesis
import pytest

from ingest.emulator import EmbeddedServer
from ingest.stores.gcs_clients import close_clients

_NUMBERS = itertools.count(1)

# Hypothesis fails an example that takes 200 ms, which on a machine with other work any of them may.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


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
