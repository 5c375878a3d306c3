"""Names of objects: the litter of desktops and hidden folders, and the two Unicode forms of one name."""

from __future__ import annotations

import unicodedata

_WINDOWS_FILES = ("thumbs.db", "desktop.ini")
_WINDOWS_FOLDERS = ("$recycle.bin", "system volume information")


def litter_kind(name: str) -> str | None:
    """Say what kind of litter an object is; None for an object that may be data.

    Args:
        name: relative to the URI that is listed, so that hidden folders above it do not count.
    """
    *folders, file = name.split("/")
    if file == ".DS_Store" or file.startswith("._") or "__MACOSX" in folders:
        return "left by macOS"
    if file.lower() in _WINDOWS_FILES or any(folder.lower() in _WINDOWS_FOLDERS for folder in folders):
        return "left by Windows"
    if any(folder.startswith(".") for folder in folders):
        return "in hidden folders"
    return "hidden files" if file.startswith(".") else None


def same_form(name: str) -> str:
    """Return a name in Unicode's composed form (NFC).

    macOS writes some letters as two characters (NFD) where other systems write one. Both look the same.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def visible(name: str) -> str:
    """Return a name as messages show it, with its characters escaped where the eye cannot tell them apart."""
    plain = name.isprintable() and name == name.strip() and name == same_form(name)
    return name if plain else ascii(name)
