"""A checkpoint that holds code, or is something else: refused without torch's advice to run it."""

from __future__ import annotations

import io
import os

import pytest
import torch

from ingest.errors import ConfigError
from ingest.stores import open_store
from train.checkpoint import load_state, unpacked
from train.weights import load_trained


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (saved({"model": Code()}), "posix.system, and not for tensors alone"),
        (saved([1]), "it holds list"),
        (b"hello world", "something else"),
        (b"", "something else"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_refused_and_no_advice_to_run_it_is_passed_on(content, why):
    with pytest.raises(ConfigError, match=why) as caught:
        unpacked(content, "runs/x/state.pt")
    assert "runs/x/state.pt" in str(caught.value)
    for advice in ("weights_only", "arbitrary code"):
        assert advice not in f"{caught.value} {caught.value.__cause__}"


def test_no_command_passes_on_the_advice(tmp_path):
    store = open_store(str(tmp_path))
    store.put("checkpoint_a/state.pt", saved({"model": Code()}))
    for load in (lambda: load_trained(f"{tmp_path}/checkpoint_a"), lambda: load_state(str(tmp_path), "checkpoint_a")):
        with pytest.raises(ConfigError, match=r"posix\.system") as caught:
            load()
        assert "weights_only" not in str(caught.value)
