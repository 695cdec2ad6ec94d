"""The documents speak of commands, options and files that exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
SCRIPTS = {"medsora", "medsora-server", "medsora-train"}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_blocks(document: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def shell_commands(document: Path) -> list[list[str]]:
    """Commands of the shell blocks, continued lines joined, comments dropped."""
    text = "\n".join(code_blocks(document, "sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if shlex.split(line, comments=True)]


def run_commands() -> set[str]:
    """Names that the case statement of ./run knows."""
    cases = (ROOT / "run").read_text().partition("case $command in")[2]
    patterns = re.findall(r"^([a-z][a-z |-]*)\)", cases, flags=re.MULTILINE)
    return {name for pattern in patterns for name in pattern.split(" | ") if not name.startswith("-")}


def subcommand_of(words: list[str]) -> list[str]:
    """The subcommand that options belong to; ``keys`` has subcommands of its own."""
    depth = 2 if words[1:2] == ["keys"] else 1
    return [word for word in words[1 : 1 + depth] if not word.startswith("-")]


@cache
def help_of(command: tuple[str, ...]) -> str:
    script = Path(sys.executable).with_name(command[0])
    result = subprocess.run(
        [script, *command[1:], "--help"], capture_output=True, text=True, check=False, env={"COLUMNS": "200"}
    )
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


def test_the_readme_names_the_two_commands() -> None:
    commands = shell_commands(ROOT / "README.md")
    assert ["./run", "demo"] in commands
    assert ["./run", "test"] in commands


@each_document
def test_run_commands_exist(document: Path) -> None:
    named = set(re.findall(r"\./run ([a-z]+)", document.read_text(encoding="utf-8")))
    assert named - run_commands() == set()


def test_run_help_lists_every_command() -> None:
    usage = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^\./run ([a-z]+)", usage, flags=re.MULTILINE)) == run_commands() - {"help"}


def test_an_unknown_run_command_fails() -> None:
    result = subprocess.run([ROOT / "run", "no-such-command"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "unknown command: no-such-command" in result.stderr


@each_document
def test_console_scripts_know_the_options_shown(document: Path) -> None:
    for words in shell_commands(document):
        if words[0] not in SCRIPTS:
            continue
        known = help_of((words[0], *subcommand_of(words)))
        options = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
        unknown = [name for name in options if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known)]
        assert unknown == [], f"{' '.join(words)} in {document.name}"


@each_document
def test_links_to_files_lead_somewhere(document: Path) -> None:
    prose = re.sub(r"(`+)[^`\n]+\1", "", document.read_text(encoding="utf-8"))  # code may look like a link
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (document.parent / target).exists()] == []


@each_document
def test_python_examples_are_python(document: Path) -> None:
    for block in code_blocks(document, "python"):
        ast.parse(block)
