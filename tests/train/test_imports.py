"""What the processes of a run load: each of them waits for its imports at every start."""

import subprocess
import sys

import pytest

NO_TORCH = ["train.__main__", "train.jobs", "train.flag", "train.monitor", "train.holdout", "ingest.quarantine_actor"]
NO_DRAWING = ["train.planned", "train.loop", "train.metrics", "ingest.datasource", "ingest.volumes"]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(NO_TORCH, ["torch"]), (NO_DRAWING, ["matplotlib", "plotly", "jinja2", "tensorboardX", "scipy"])],
    ids=["what asks or deals", "what plans and trains"],
)
def test_a_process_of_a_run_loads_nothing_heavy_that_it_has_no_use_for(modules, heavy):
    code = f"import sys, {', '.join(modules)}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
