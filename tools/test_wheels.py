"""Installs the wheels and the sdist of a folder into clean environments and runs tools/smoke_test.py in each.

python tools/test_wheels.py dist [--python 3.10 3.12 ...] [--torch 2.13.0] [--allow-cuda]

For every Python: the wheel with torch and numpy alone, then with ``napo[toolkit]``. Where the package index has only
the CUDA build of torch for a Python, which is gigabytes with what it needs, the compiled module is tested without
torch, and the last line says so; ``--allow-cuda`` installs it. The sdist is built and tested with the first Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MIB = 20
SMOKE = Path(__file__).resolve().parent / "smoke_test.py"
CONSTRAINTS = SMOKE.parent.parent / "requirements" / "constraints.txt"


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, or among pyenv's. Only one that runs counts: shims may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for candidate in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        try:
            subprocess.run([candidate, "-c", "import venv"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return str(candidate)
    return None


def run(command: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\nfailed with exit code {done.returncode}")
    return done


class Environment:
    """A clean virtual environment. Nothing of the repository is on its path."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        run([python, "-m", "venv", str(folder)], folder=folder.parent)
        self.python = str(folder / "bin" / "python")
        self.install("--upgrade", "pip")

    def install(self, *arguments: str) -> None:
        run([self.python, "-m", "pip", "install", "--quiet", *arguments], folder=self.folder)

    def torch_is_cuda(self, requirement: str) -> bool:
        """Whether what pip would install for ``requirement`` asks for CUDA's libraries."""
        report = self.folder / "report.json"
        self.install("--dry-run", "--no-deps", "--report", str(report), requirement)
        needs = json.loads(report.read_text())["install"][0]["metadata"].get("requires_dist", [])
        return any(need.startswith(("nvidia", "cuda")) for need in needs)

    def smoke(self, level: str) -> None:
        copy = shutil.copy(SMOKE, self.folder)
        print(run([self.python, copy, "--level", level], folder=self.folder).stdout, end="", flush=True)


def test_package(package: Path, python: str, torch: str, allow_cuda: bool, constraints: Path | None) -> str:
    """Tests one file with one Python; returns the level that was reached."""
    pins = ["--constraint", str(constraints)] if constraints else []
    with tempfile.TemporaryDirectory(prefix="napo-wheel-") as work:
        environment = Environment(python, Path(work) / "venv")
        if not allow_cuda and environment.torch_is_cuda(f"torch=={torch}"):
            environment.install("numpy", *pins)
            environment.install("--no-deps", str(package))
            environment.smoke("module")
            return "module (only a CUDA build of torch is offered)"
        environment.install(f"torch=={torch}", *pins)
        environment.install(str(package), *pins)
        environment.smoke("kernels")
        environment.install(f"napo[toolkit] @ {package.as_uri()}", *pins)
        environment.smoke("toolkit")
        return "toolkit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels and the sdist are")
    parser.add_argument("--python", nargs="+", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--allow-cuda", action="store_true", help="install torch's CUDA build where there is no other")
    parser.add_argument("--newest", action="store_true", help="the newest versions, not those of requirements/")
    options = parser.parse_args()
    results = []
    for version in options.python:
        tag = f"cp{version.replace('.', '')}"
        wheels = sorted(
            options.folder.resolve().glob(f"napo-*-{tag}-{tag}-*.whl"), key=lambda file: file.stat().st_mtime
        )
        python = find_python(version)
        if python is None or not wheels:
            sys.exit(
                f"--python {version}: no {'interpreter' if python is None else f'wheel {tag} in {options.folder}'}"
            )
        packages = [wheels[-1]]
        if version == options.python[0]:
            packages += sorted(options.folder.resolve().glob("napo-*.tar.gz"))
        for package in packages:
            size = package.stat().st_size / 2**20
            assert size < LIMIT_MIB, f"{package.name}: {size:.1f} MiB, the limit is {LIMIT_MIB}"
            began = time.monotonic()
            level = test_package(
                package, python, options.torch, options.allow_cuda, None if options.newest else CONSTRAINTS
            )
            results.append(
                f"{package.name}: Python {version}, {size:.1f} MiB, {time.monotonic() - began:.0f} s, {level}"
            )
    print("\n".join(results))
    print(f"{len(results)} passed, 0 failed")


if __name__ == "__main__":
    main()
