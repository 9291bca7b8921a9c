"""The documents hold what they promise: links work, cited sections exist, and lists are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import napo_kernels
from napo.data.sources import SOURCES
from napo.data.styles import STYLES
from napo.objectives import OBJECTIVES
from napo_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "studies", "benchmarks", "csrc", "napo_kernels", "napo", "tests")
FILES = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*"))]
DOCUMENTS = sorted(str(file.relative_to(ROOT)) for file in FILES if file.suffix == ".md")
CODE = sorted(file for file in FILES if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))


def text(name: str) -> str:
    """A document without its blocks of code, whose comments look like headings."""
    return re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(name: str, heading: str) -> str:
    """A section of a document, from its heading to the next one of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}.*\n", text(name), re.MULTILINE)
    assert found is not None, f"{name} has no section {heading!r}"
    rest = text(name)[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), f"{document}: {target} does not exist"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", text(str(file.relative_to(ROOT))), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{document}: {target} has no such heading"


def test_cited_sections_of_the_design_exist() -> None:
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", text("docs/design.md"), re.MULTILINE))
    cited = {
        (file.name, number)
        for file in CODE
        for numbers in re.findall(r"(?:DESIGN|design)\.md,?(?: sections?)? ([\d., and]*\d)", file.read_text("utf-8"))
        for number in re.findall(r"\d+(?:\.\d+)?", numbers)
    }
    assert cited, "no file cites the design"
    assert {number for _, number in cited} <= sections, cited


@pytest.mark.parametrize("op", backends()["reference"]["ops"])
def test_every_op_is_documented(op: str) -> None:
    assert f"| `{op}` |" in section("docs/training_loop.md", "Ops and backends")
    assert op in section("docs/design.md", "4. The ops")


@pytest.mark.parametrize("name", napo_kernels.__all__)
def test_every_public_name_of_the_kernels_is_in_the_reference(name: str) -> None:
    assert f"::: napo_kernels.{name}\n" in (ROOT / "docs" / "reference" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", napo_kernels.__all__)
def test_examples_of_docstrings_are_a_section(name: str) -> None:
    """Elsewhere the site takes ``>>>`` for quotations."""
    found = inspect.getdoc(getattr(napo_kernels, name)) or ""
    assert not re.search("^>>> ", found, re.MULTILINE), f"{name}: put the example under 'Examples:', four spaces in"


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_documented(source: str) -> None:
    assert f"`{source}`" in section("docs/data.md", "Data sets")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_documented(objective: str) -> None:
    assert f"`{objective}`" in section("docs/preference_data.md", "Your own preference rows")
    assert f"`{objective}`" in section("docs/glossary.md", "Training")
    table = section("docs/design.md", "3. The objective").lower().replace("-", "")
    assert f"| {objective} |" in table


@pytest.mark.parametrize("style", STYLES)
def test_every_prompt_style_is_documented(style: str) -> None:
    assert f"- `{style}`:" in section("docs/toolkit.md", "The toolkit")


def test_every_option_of_the_trainer_is_documented() -> None:
    """The table comes from ``napo.trainer.config.options_table()``; where this fails, put its text there."""
    from napo.trainer.config import options_table

    assert options_table() in (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
