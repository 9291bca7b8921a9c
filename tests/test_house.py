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
