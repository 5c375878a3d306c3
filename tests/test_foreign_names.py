"""A folder whose `train.py` Ray's workers would import in place of ours is refused before Ray starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train.config  # this process uses both packages
from ingest.errors import ConfigError
from ingest.foreign_names import refuse_foreign_modules

ROOT = Path(train.config.__file__).parents[1]
THEIRS = "open('theirs-ran', 'w').close()\n"


def make(folder: Path, name: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(THEIRS)
    return file


def python(cwd: Path, *call: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *call], cwd=cwd, env=env, capture_output=True, text=True)


def script(folder: Path, text: str) -> str:
    """A file in a folder of its own, which is then first on the import path, as the console script's is."""
    folder.mkdir(parents=True)
    file = folder / "script.py"
    file.write_text(text)
    return str(file)


VOXFLUX = "import sys\nfrom train.__main__ import main\nsys.exit(main())\n"


@pytest.mark.parametrize("name", ["train.py", "train/__init__.py", "ingest.py", "ingest/__init__.py"])
def test_a_module_with_the_name_of_one_of_our_packages_is_refused_and_named(name, tmp_path, monkeypatch):
    file = make(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected no other module named") as refused:
        refuse_foreign_modules()
    assert str(file) in str(refused.value)
    assert "start voxflux from another folder, or rename that module" in str(refused.value)
    assert not (tmp_path / "theirs-ran").exists()


def test_a_folder_of_data_named_train_and_our_own_checkout_are_no_other_modules(tmp_path, monkeypatch):
    make(tmp_path, "train/images/case_x.npy")
    (tmp_path / "link").symlink_to(ROOT)
    for folder in (tmp_path, ROOT, tmp_path / "link"):
        monkeypatch.chdir(folder)
        refuse_foreign_modules()


def test_the_folder_of_the_script_that_runs_is_looked_at_too(tmp_path, monkeypatch):
    file = make(tmp_path / "bin", "train.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "voxflux")])
    refuse_foreign_modules()  # Ray passes the folder on only if it is on the import path
    monkeypatch.syspath_prepend(tmp_path / "bin")
    with pytest.raises(ConfigError, match=str(file)):
        refuse_foreign_modules()


def test_run_is_refused_before_it_makes_a_folder_or_data(tmp_path):
    folder = tmp_path / "theirs"
    file = make(folder, "train.py")
    done = python(folder, script(tmp_path / "bin", VOXFLUX), "run", "demo")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: expected no other module named `train` in {folder}, found {file}")
    assert list(folder.iterdir()) == [file]


def test_no_command_starts_ray_in_such_a_folder_but_a_users_train_may_use_our_ingest(tmp_path):
    folder = tmp_path / "theirs"
    make(folder, "train.py")
    starts = "from ingest.cluster import connected_ray\nfrom ingest.foreign_names import refuse_foreign_modules\n"
    done = python(
        folder, script(tmp_path / "a", f"import train.config\n{starts}with connected_ray():\n    print('started')\n")
    )
    assert "expected no other module named `train`" in done.stderr
    assert "started" not in done.stdout
    done = python(folder, script(tmp_path / "b", f"{starts}refuse_foreign_modules()\nprint('may start')\n"))
    assert done.stdout == "may start\n", done.stderr


@pytest.mark.parametrize("name", ["ingest.py", "ingest/__init__.py"])
def test_python_m_train_beside_another_ingest_says_so_and_does_not_run_it(name, tmp_path):
    file = make(tmp_path, name)
    done = python(tmp_path, "-m", "train", "run", "demo")
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected voxflux's own package `ingest` in ")
    assert f"found {file}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "theirs-ran").exists()
