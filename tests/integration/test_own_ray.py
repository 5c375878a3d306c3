"""A Ray that we start: where there is no home, where its node is slow, and below a folder with a space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingest.cluster import start_ray
from ingest.errors import ClusterError, ConfigError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"

SCRIPT = f"""
import os
import sys
import ray
from ray._private import services
from ingest.cluster import connected_ray
from tests.integration.chaos import processes

found = services.get_node
failed = []

def slow_once(*arguments):
    if not failed:
        failed.append(True)
        raise Exception({SLOW!r})
    return found(*arguments)

services.get_node = slow_once

@ray.remote
def token():
    return os.environ["RAY_AUTH_TOKEN"]

@ray.remote
class WithEnvironment:  # Ray starts the process of such an actor by a line of a shell, as those of Ray Train
    def interpreter(self):
        return sys.executable

with connected_ray() as here:
    ours = [each.command for each in processes().values() if each.parent == os.getpid()]
    for name in ("raylet/raylet", "gcs/gcs_server"):
        print(name, sum(name in command.partition(" --")[0] for command in ours))
    actor = WithEnvironment.options(runtime_env={{"env_vars": {{"ANY": "1"}}}}).remote()
    print("space", " " in ray.get(actor.interpreter.remote(), timeout=240))
    print("token", len(ray.get(token.remote())), os.environ.get("RAY_AUTH_TOKEN"))
print("failed", len(failed))
"""


def test_without_a_home_below_a_space_and_slow_once_ray_starts_and_leaves_nothing_of_its_first_start(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Nobody, root included, can make a folder there; Ray would write its token to it.
    env |= {"HOME": "/proc/nowhere", "RAY_USAGE_STATS_ENABLED": "0"}
    spaced = tmp_path / "My Projects"
    spaced.mkdir()
    (spaced / "venv").symlink_to(sys.prefix)
    python = spaced / "venv" / Path(sys.executable).relative_to(sys.prefix)
    done = subprocess.run([str(python), "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-5:] == [
        *("raylet/raylet 1", "gcs/gcs_server 1", "space True", "token 64 None", "failed 1")
    ]


class Init:
    """Stands for `ray.init`: raises these errors, one after the other, and then starts."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, **settings: object) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


def test_a_start_that_is_too_slow_twice_ends_in_an_error_of_ours():
    init = Init(Exception(SLOW), Exception(SLOW))
    with pytest.raises(ClusterError, match=r"found: Exception: The current node .*try again when the machine has"):
        start_ray(init)
    assert init.calls == 2


def test_a_start_that_fails_otherwise_is_not_tried_again():
    init = Init(ValueError("first line\nThe plasma directory file /x does not exist"))
    with pytest.raises(ClusterError, match=r"found: ValueError: The plasma directory file /x .*session_latest/logs"):
        start_ray(init)
    assert init.calls == 1


def test_an_error_of_ours_that_comes_while_ray_starts_stays_as_it_is():
    with pytest.raises(ConfigError, match="ours"):
        start_ray(Init(ConfigError("ours")))
