"""Sweeping composites: the old ones go, everything else stays."""

import time

import pytest

from ingest.__main__ import main
from ingest.clean import parse_age
from ingest.errors import ConfigError
from ingest.stores import open_store


@pytest.fixture
def littered(bucket: str) -> str:
    """A bucket with two composites left behind and a volume beside them."""
    store = open_store(f"gs://{bucket}")
    for name in ("dataflux-composed-objects/a", "dataflux-composed-objects/b", "images/case_x.npy"):
        store.put(name, b"12345")
    return bucket


def left(bucket: str) -> list[str]:
    from ingest.stores.base import StoreConfig
    from ingest.stores.gcs_clients import google_client

    return sorted(blob.name for blob in google_client(StoreConfig()).list_blobs(bucket))


def test_old_composites_are_swept_and_nothing_else(littered, capsys):
    time.sleep(1.1)
    assert main(["clean", f"gs://{littered}", "--older-than", "1s"]) == 0
    assert "deleted 2 composites, 10 bytes" in capsys.readouterr().out
    assert left(littered) == ["images/case_x.npy"]


def test_young_composites_stay(littered, capsys):
    assert main(["clean", f"gs://{littered}"]) == 0
    assert "deleted 0 composites" in capsys.readouterr().out
    assert len(left(littered)) == 3


def test_a_dry_run_names_them_and_deletes_nothing(littered, capsys):
    assert main(["clean", f"gs://{littered}", "--older-than", "0s", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "dataflux-composed-objects/a: 5 bytes" in printed
    assert "would delete 2 composites" in printed
    assert len(left(littered)) == 3


@pytest.mark.parametrize(
    ("uri", "message"), [("gs://no-such-bucket-here", "does not exist"), ("/tmp", "expected gs://bucket")]
)
def test_a_wrong_place_is_a_clear_error(gcs_server, capsys, uri, message):
    assert main(["clean", uri]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1", "h", "1w", "-1h", "1.5h", ""])
def test_what_is_no_age_is_refused(text):
    with pytest.raises(ConfigError, match="expected an age"):
        parse_age(text)
