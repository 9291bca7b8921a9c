"""The code in the documents runs: Python blocks page by page, and the commands of shell blocks as far as they can.

A block that cannot run here says why in a comment before it: <!-- not run: needs a GPU -->. It must still compile.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SPECIFIED = ("design.md", "glossary.md")  # equations and signatures, no programs
PAGES = sorted(page for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if page.name not in SPECIFIED)
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
SHELL = ("bash", "sh", "shell", "console")
OTHER = ("text", "json", "html", "toml", "yaml", "jsonl", "http", "dockerfile", "ini", "csv")


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def pages_with(kinds: tuple[str, ...]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES if any(block["kind"] in kinds for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_names_its_language(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.M)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", *SHELL, *OTHER}, fences[::2]


@pytest.mark.parametrize("name", pages_with(("python",)))
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after another, as a reader would type them, in a folder with ``my-model`` and
    ``preferences.jsonl``."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "napo"))
    found = [block for block in blocks(ROOT / name) if block["kind"] == "python"]
    for block in found:
        compile(block["code"], name, "exec", ast.PyCF_ONLY_AST)
    run = [block for block in found if not block["reason"]]
    monkeypatch.chdir(tmp_path)
    if any("my-model" in block["code"] or "preferences.jsonl" in block["code"] for block in run):
        from trainer_cases import make_rows, tiny_model, tiny_tokenizer

        tiny_model().save_pretrained("my-model")
        tiny_tokenizer().save_pretrained("my-model")
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in make_rows(10)]
        Path("preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, object] = {"__name__": "__main__"}
    for block in run:
        line = (ROOT / name).read_text(encoding="utf-8")[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(ROOT / name), "exec"), names)


def commands(name: str) -> list[list[str]]:
    """The commands of a page's shell blocks; those behind && each on its own, without prompts and comments."""
    found = []
    for block in blocks(ROOT / name):
        if block["kind"] in SHELL and not block["reason"]:
            code = block["code"].replace("\\\n", " ")
            for line in code.split("\n"):
                for command in line.removeprefix("$ ").split(" && "):
                    if words := shlex.split(command, comments=True):
                        found.append(words)
    return found


@pytest.mark.parametrize("name", pages_with(SHELL))
def test_shell_commands_are_right(name: str) -> None:
    """Subcommands and options of ``napo`` exist and take these values, so do targets, extras, modules and files."""
    for words in commands(name):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables before the command
            words = words[1:]
        check = {"napo": check_napo, "make": check_make, "pip": check_pip, "python": check_python}.get(words[0])
        if check is not None:
            check(words[1:])


def check_napo(words: list[str]) -> None:
    asked = "--help" in words
    import typer

    from napo.cli import application

    words = [word for word in words if word != "--help"]
    if not words:
        return
    group: Any = typer.main.get_command(application(words[0]))
    assert words[0] in group.commands, f"napo {' '.join(words)}: no such command"
    with group.make_context("napo", list(words)) as parent:
        command = group.commands[words[0]]
        if not asked:
            command.make_context(words[0], list(words[1:]), parent=parent)  # raises where an option is wrong


def check_make(words: list[str]) -> None:
    """Read from the Makefile: ``make -n`` runs the lines that call make again."""
    known = re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        if "=" not in word and not word.startswith("-"):
            assert word in known, f"make {word}: no such target"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"(?:napo|\.)\[(.+)\]", word):
            assert set(found[1].split(",")) <= set(extras), f"{word}: no such extra"


def check_python(words: list[str]) -> None:
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), f"python {words[0]}: no such file"
