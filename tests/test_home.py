"""A place below a home folder, where there is none, is refused by each that takes places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ingest.errors import ConfigError
from ingest.home import expanded
from ingest.stores import open_store
from train.ledger import absolute_place
from train.recipes import DEMO
from train.run_folder import resolve_run_dir


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: HOME is not set, and the user has no entry in the passwd file."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(
    "take",
    [
        expanded,
        open_store,
        absolute_place,
        lambda place: resolve_run_dir(dataclasses.replace(DEMO, run_dir=place), "demo"),
    ],
)
def test_a_place_below_a_home_that_is_not_there_is_refused(no_home, take):
    with pytest.raises(ConfigError, match=r"expected a home folder for ~/runs/a, found none: .*; set HOME, or give an"):
        take("~/runs/a")


def test_a_place_below_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    assert expanded("~/a") == "/home/u/a"
    assert absolute_place("~/a") == str(Path("/home/u/a").resolve())


def test_other_places_stay_as_they_are(no_home):
    assert [expanded(place) for place in ("/a/~", "a", "~nobody-of-this-name/a")] == [
        "/a/~",
        "a",
        "~nobody-of-this-name/a",
    ]
