"""Marks of tests that need something which not every machine has, with the reason that a skipped test prints."""

import pytest

from ingest.stores import dataflux

needs_dataflux = pytest.mark.skipif(
    dataflux.missing() is not None, reason="composed reads need gcs-torch-dataflux, which Python 3.13 has no release of"
)
COMPOSE = pytest.param("compose", marks=needs_dataflux)
"""The transport `compose`, as a parameter of a test."""
