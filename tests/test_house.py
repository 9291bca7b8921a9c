"""The house rules that a machine can check: imports go down only, and rooms keep to themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, inside functions too."""
    package = ".".join(file.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("file", sorted((ROOT / "napo_kernels").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_import_nothing_above_them(file: Path) -> None:
    allowed = {"torch", "numpy", "triton", "napo_kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(file)} <= allowed


@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
def test_backends_import_neither_ops_nor_one_another(backend: str) -> None:
    others = [f"napo_kernels.{other}" for other in ("ops", "reference", "triton", "native") if other != backend]
    for file in (ROOT / "napo_kernels" / backend).rglob("*.py"):
        crossing = [name for name in imports(file) if any(inside(name, other) for other in others)]
        assert not crossing, f"{file.relative_to(ROOT)} imports {crossing}"


def test_kernels_import_without_the_toolkit_and_its_dependencies() -> None:
    code = (
        "import sys, napo_kernels; heavy = {'napo', 'transformers', 'peft', 'pandas', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The rooms of napo/ from the ground up: a room imports from those in lines above its own and from no other.
FLOORS = (
    {"extras", "progress", "files", "options", "signals", "objectives"},
    {"assets"},
    {"identity"},
    {"data"},
    {"runs"},
    {"language_models"},
    {"scoring"},
    {"catalogue"},
    {"recommenders", "trainer"},
    {"finetuning", "evaluation", "recommend"},
    {"stages"},
    {"demo"},
    {"cli"},
    {"__main__"},
)


def toolkit_modules() -> dict[str, Path]:
    """{absolute name of a module of napo: its file}"""
    modules = {}
    for file in sorted((ROOT / "napo").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def test_rooms_of_the_toolkit_import_from_lower_floors_only() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    modules = toolkit_modules()
    rooms = {name.split(".")[1] for name in modules if "." in name}
    assert rooms == set(floor), "FLOORS lists the rooms of napo/, each once"
    for name, file in modules.items():
        room = name.split(".")[1] if "." in name else ""
        below = {other for other in rooms if room and floor[other] < floor[room]} | {room}
        reached = {found.split(".")[1] for found in imports(file) if found.startswith("napo.")} & rooms
        assert reached <= below, f"{name} imports from {', '.join(sorted(reached - below))}; see FLOORS"


def test_modules_of_the_toolkit_import_in_no_circle() -> None:
    modules = toolkit_modules()
    waiting = {name: {found for found in imports(file) if found in modules} - {name} for name, file in modules.items()}
    # A package's own modules do not wait for its __init__, which gathers names from them.
    waiting = {
        name: {other for other in found if not (inside(name, other) and name != other)}
        for name, found in waiting.items()
    }
    while ready := {name for name, found in waiting.items() if not found & set(waiting)}:
        waiting = {name: found for name, found in waiting.items() if name not in ready}
    assert not waiting, f"these import one another: {', '.join(sorted(waiting))}"
