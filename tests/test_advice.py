"""What messages advise can be done: every option that one names is an option of some command."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from ingest import __main__ as ingest_main
from ingest import commands
from ingest.clean import CleanConfig
from ingest.prepare import PrepareConfig
from train import __main__ as train_main
from train.commands import chosen_recipe
from train.inference import EvaluateConfig
from train.recipes import RECIPES

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9]*(?:[.-][a-z0-9]+)*)(?![\w.{-]*\{)")
OF_OTHERS = {
    *("config", "name"),  # of `run --config FILE`, which its help leaves out
    *("head", "temp-dir"),  # of `ray start`
    *("shm-size", "ulimit"),  # of `docker run`
}


def help_of(main, *arguments: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return printed.getvalue()


@pytest.fixture(scope="module")
def helps() -> list[str]:
    texts = [help_of(ingest_main.main, name) for name in ingest_main.COMMANDS]
    texts += [help_of(train_main.main, name) for name in train_main.COMMANDS if name != "run"]
    texts += [help_of(train_main.main, command, name) for command in ("run", "submit") for name in RECIPES]
    return texts


@pytest.fixture(scope="module")
def options(helps: list[str]) -> set[str]:
    return {found for text in helps for found in OPTION.findall(text)}


def messages(folder: str) -> Iterator[tuple[str, str]]:
    """Each text of a package that is no docstring, with its place."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr):  # a text that stands alone documents the line above it
                docstrings.add(id(node.value))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value


@pytest.mark.parametrize("folder", ["ingest", "train"])
def test_every_option_that_a_message_names_is_an_option_of_a_command(folder, options):
    assert {"images", "trainer.resume", "data.on-bad", "checkpoint", "source"} <= options
    named = [(place, option) for place, text in messages(folder) for option in OPTION.findall(text)]
    assert len(named) > 30
    unknown = [(place, option) for place, option in named if option not in options | OF_OTHERS]
    assert unknown == []


def test_an_option_that_takes_no_value_is_advised_without_one(helps):
    """A boolean becomes the options `--trainer.check-resources` and `--trainer.no-check-resources`, with no value."""
    advised = {
        (place, option)
        for folder in ("ingest", "train")
        for place, text in messages(folder)
        for option in re.findall(r"--([a-z.-]+[a-z]) (?:True|False)", text)
    }
    assert advised
    take_a_value = {option for text in helps for option in re.findall(r"--([a-z.-]+[a-z])\s+\{None,True,False\}", text)}
    assert {option for _, option in advised} <= take_a_value, advised


LITERAL = {
    "0",
    "1",
    "1h",
    "True",
    "False",
    "auto",
    "fail",
    "fp32",
    "grid",
    "held-out",
    "kits19",
    "quarantine",
    "refresh",
}
LITERAL |= {"resample", "''"}
"""Values that messages advise as they stand; other words after an option are prose or a place to fill."""
GIVEN = {
    "run": lambda given: chosen_recipe(["demo", *given]),
    "index": lambda given: tyro.cli(
        commands.IndexConfig, args=["--images", "i", "--labels", "l", "--output", "o", *given]
    ),
    "prepare": lambda given: tyro.cli(
        PrepareConfig, args=["--source", "kits19", "--input", "i", "--output", "o", *given]
    ),
    "clean": lambda given: tyro.cli(CleanConfig, args=["gs://b", *given]),
    "evaluate": lambda given: tyro.cli(EvaluateConfig, args=["--checkpoint", "c", *given]),
}


def accepted(given: list[str]) -> list[str]:
    """The commands that take these arguments."""
    taken = []
    for name, parse in GIVEN.items():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(SystemExit):
                parse(given)
                taken.append(name)
    return taken


def test_every_value_that_a_message_advises_is_accepted_by_its_command():
    advised = re.compile(r"(?<![\w-])(--[a-z][a-z0-9]*(?:[.-][a-z0-9]+)*) ([^\s`;,:)]+)")
    named = {found for folder in ("ingest", "train") for _, text in messages(folder) for found in advised.findall(text)}
    as_they_stand = sorted((option, value) for option, value in named if value in LITERAL)
    assert len(as_they_stand) >= 15
    assert {value for _, value in as_they_stand} == LITERAL
    refused = [(option, value) for option, value in as_they_stand if not accepted([option, value.strip("'")])]
    assert refused == []
    assert accepted(["--trainer.check-resources", "False"]) == []  # an advice that was once given, and is refused


def test_what_commands_print_keeps_names_in_brackets():
    """Rich takes `[ct]` for markup and drops it, where a console is not told otherwise: one function makes consoles."""
    consoles = re.compile(r"(?<![.\w])Console\(([^()]*)\)")
    files = [file for folder in ("ingest", "train") for file in sorted((ROOT / folder).rglob("*.py"))]
    made = [(file.name, given) for file in files for given in consoles.findall(file.read_text())]
    assert {"terminal.py"} <= {name for name, _ in made}
    assert [each for each in made if "markup=False" not in each[1] and "stderr=True" not in each[1]] == []
