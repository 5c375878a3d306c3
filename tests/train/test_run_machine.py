"""`run` and `size` look at the machine and at RAY_ADDRESS before they make a demo's data or a run folder."""

from __future__ import annotations

import pytest

from train.__main__ import main


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RAY_ADDRESS": "garbage"}, "expected RAY_ADDRESS=HOST:PORT"),
        ({"RAY_ADDRESS": "127.0.0.1:6379", "RAY_AUTH_TOKEN_PATH": "token"}, "an absolute path in RAY_AUTH_TOKEN_PATH"),
        ({"RAY_ADDRESS": "", "RAY_TMPDIR": "/tmp/" + 100 * "x"}, "bytes in RAY_TMPDIR"),
        ({"RAY_ADDRESS": "local", "RAY_TMPDIR": "/tmp/" + 100 * "x"}, "bytes in RAY_TMPDIR"),
    ],
)
def test_what_ray_could_not_start_with_ends_a_demo_before_anything_is_made(
    monkeypatch, capsys, tmp_path, variables, found
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's may be
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "demo"]) == 1
    printed = capsys.readouterr()
    assert found in printed.err
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_size_looks_at_the_machine_before_it_makes_data_to_measure(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 100 * "x")
    assert main(["size", "--gpus", "1", "--step-s", "1", "--batch", "2"]) == 1
    assert "bytes in RAY_TMPDIR" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
