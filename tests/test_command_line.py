"""The command line: help without PyTorch, and exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import typer
from conftest import ROOT

from autoround_modifier.cli.main import COMMANDS, GROUPS, app, main
from autoround_modifier.cli.outcome import (
    DONE,
    FAILED,
    REFUSED,
    USAGE,
    UsageError,
    reported,
)
from autoround_modifier.errors import FailedError, SchemeError
from autoround_modifier.version import __version__

HELP = [[], *([name] for name in [*COMMANDS, *GROUPS])]
# Starts as the console script does, and says whether PyTorch was imported.
SCRIPT = """
import sys
sys.argv = ["autoround-modifier", *sys.argv[1:]]
from autoround_modifier.cli.main import main
code = main()
heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("command", HELP, ids=lambda command: " ".join(command) or "all")
def test_help_needs_neither_pytorch_nor_a_second(command):
    before = os.times()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command, "--help"], capture_output=True, text=True
    )
    after = os.times()
    assert run.returncode == DONE, run.stderr
    assert "Usage:" in run.stdout
    assert after.children_user - before.children_user < 1


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "autoround_modifier", "--version"],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == __version__
    assert " torch\n" not in run.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SchemeError("no such scheme"), REFUSED, "refused: no such scheme"),
        (FileNotFoundError(2, "No such file", "a"), REFUSED, "refused: [Errno 2]"),
        (FailedError("stopped in block 3"), FAILED, "failed: stopped in block 3"),
        (KeyboardInterrupt(), FAILED, "interrupted"),
        (ZeroDivisionError("x"), FAILED, "failed: ZeroDivisionError: x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_code_of(error, code, said, capsys):
    @reported
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        command()
    assert end.value.exit_code == code
    assert said in capsys.readouterr().err


def test_wrong_flags_are_usage_errors(capsys):
    @reported
    def command() -> None:
        raise UsageError("--a excludes --b")

    with pytest.raises(typer.BadParameter, match="--a excludes --b"):
        command()
    assert main(["quantize", "somewhere", "--no-such-flag"]) == USAGE
    assert "no-such-flag" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out.strip() == __version__


# ---------------------------------------------------------------------- documentation


def flags_of(command: str) -> set[str]:
    """:return: all flags of a command, such as ``quantize`` or ``recipes new``"""
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    flags = {flag for item in found.params for flag in (*item.opts, *item.secondary_opts)}
    return flags | {"--help"}


def documented() -> list[tuple[str, str]]:
    """:return: file and command line of each call that the documentation shows"""
    found = []
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    files += sorted((ROOT / "examples").rglob("*.*"))
    for file in files:
        if file.suffix not in (".md", ".yaml", ".py"):
            continue
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^[#$ ]*autoround-modifier (.+)$", text, re.MULTILINE):
            found.append((file.name, line.split(" #")[0]))
    return found


def test_the_documentation_shows_commands_and_flags_that_exist():
    groups = {name: typer.main.get_command(group) for name, group in GROUPS.items()}
    calls = documented()
    assert len(calls) > 20
    for file, call in calls:
        words = call.split()
        command = words[0]
        if command in groups:
            command = " ".join(words[:2])
        elif command not in COMMANDS:
            assert command.startswith("--"), f"{file}: {call}"
            continue
        given = {word.partition("=")[0].replace("_", "-") for word in words if word[:2] == "--"}
        assert given <= flags_of(command), f"{file}: {call}"


def test_flags_beside_those_of_auto_round_exist():
    text = (ROOT / "docs" / "guides" / "from-auto-round.md").read_text(encoding="utf-8")
    ours = flags_of("quantize") | flags_of("evaluate")
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")]
    given = {flag for cell in rows for flag in re.findall(r"--[a-z][a-z-]*", cell)}
    assert len(given) > 15
    assert given - {"--no-"} <= ours
