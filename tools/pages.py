"""The pages of the site: the Markdown and the pictures that git has, gathered in build/pages in the same folders.

A hook of MkDocs (mkdocs.yml), so that links between docs/, studies/, benchmarks/ and the root are those that one reads
in the repository, and MkDocs checks all of them. It adds the studies and the new pages of docs/ to the navigation, and
writes the page of the command line from the commands themselves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
CLI = Path("docs", "reference", "cli.md")
KINDS = ("*.md", "docs/*.css", "*.png", "*.svg", "*.log", "*.json")


def gather() -> None:
    """Copies what git has, and what is new and not ignored."""
    shutil.rmtree(PAGES, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *KINDS]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith((".", "tests/")):
            target = PAGES / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    (PAGES / "README.md").rename(PAGES / "index.md")
    for page in PAGES.rglob("*.md"):
        page.write_text(within_the_site(page))


def within_the_site(page: Path) -> str:
    """The page with its links to README.md led to the home page, and those to folders and code made plain text."""

    def link(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        path, hash_, fragment = target.partition("#")
        if "://" in target or not path:
            return found[0]
        if path.endswith("README.md") and (page.parent / path).resolve() == PAGES / "README.md":
            return f"[{label}]({path.removesuffix('README.md')}index.md{hash_}{fragment})"
        return found[0] if (page.parent / path).is_file() else label

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, page.read_text(encoding="utf-8"))


def title(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


def command_line() -> str:
    """The page of the command line, and behind it what every command says under --help."""
    import typer

    from napo.cli import COMMANDS, application

    parts = [(PAGES / CLI).read_text().strip()]
    for name in COMMANDS:
        group: Any = typer.main.get_command(application(name))
        command = group.commands[name]
        with group.make_context("napo", [name], resilient_parsing=True) as parent:
            context = type(parent)(command, info_name=name, parent=parent, max_content_width=84, terminal_width=84)
            parts += [f"## napo {name}", f"```text\n{command.get_help(context).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def on_config(config: Any, **_: Any) -> Any:
    sys.path.insert(0, str(ROOT))
    gather()
    (PAGES / CLI).write_text(command_line())
    sections = {name: entries for section in config.nav for name, entries in section.items()}
    named = {page for entries in sections.values() if isinstance(entries, list) for e in entries for page in e.values()}
    new = [page for page in sorted((PAGES / "docs").glob("*.md")) if str(page.relative_to(PAGES)) not in named]
    sections["How to"] += [{title(page): str(page.relative_to(PAGES))} for page in new]
    studies = sorted((PAGES / "studies").glob("*.md"))
    sections["Measurements"] += [{"Studies": [{title(page): str(page.relative_to(PAGES))} for page in studies]}]
    return config
