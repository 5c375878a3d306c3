"""One line that Ray prints as an error, and that is none, does not reach the terminal; all others do."""

import os
import subprocess
import sys

import pytest

from train.ray_noise import without_actor_warning

LINE = (
    b"[2026-11-29 13:10:20,854 E 1 1] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches(Predictor))' "
    b"and ID: 'f6' has constructor arguments in the object store and max_restarts > 0. If the arguments in the object "
    b"store go out of scope or are lost, the actor restart will fail.\n"
)


def test_the_line_is_left_out_and_others_come_through_in_their_order(capfd):
    with without_actor_warning():
        os.write(2, b"before\n" + LINE + b"[E] core_worker.cc: a real error\n")
        os.write(2, b"no end of line")
    os.write(2, b"\nafter\n")
    said = capfd.readouterr().err
    assert said == "before\n[E] core_worker.cc: a real error\nno end of line\nafter\n"


def test_stderr_is_put_back_after_an_error_too(capfd):
    with pytest.raises(ValueError, match="inside"), without_actor_warning():
        raise ValueError("inside")
    os.write(2, LINE)
    assert capfd.readouterr().err.encode() == LINE


def test_a_closed_stderr_is_left_as_it_is():
    code = "from train.ray_noise import without_actor_warning as w\nwith w(): print('went on')"
    done = subprocess.run(f'exec {sys.executable} -c "{code}" 2>&-', shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n")
