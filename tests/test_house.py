"""The house rules that a machine can check: imports go down only, rooms keep to themselves, functions stay narrow, and
an op has the same files as every other one."""

from __future__ import annotations

import ast
import re
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
    {"extras", "program", "progress", "files", "options", "signals", "objectives", "ranks", "machine"},
    {"assets"},
    {"identity"},
    {"data"},
    {"runs"},
    {"language_models"},
    {"scoring"},
    {"catalogue"},
    {"recommenders", "trainer"},
    {"finetuning", "evaluation", "recommend"},
    {"stages", "serve", "export"},
    {"demo"},
    {"command_line"},
    {"commands"},
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
        if "." not in name:  # napo itself hands on names of any room, when they are asked for
            continue
        room = name.split(".")[1]
        below = {other for other in rooms if floor[other] < floor[room]} | {room}
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


# ---- functions ------------------------------------------------------------------------------------------------------

MOST = 13  # parameters: linear_sequence_logps, whose options are its own
MOST_OPTIONS = 14  # of a command, whose parameters are options that are given by name: napo evaluate
MOST_POSITIONAL = 6  # of functions that only hand their arguments on to a kernel
AS_TRANSFORMERS = "napo_trainer.py"  # the constructor takes the arguments of transformers' Trainer beside its own

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(file: Path) -> list[Function]:
    """But for the kernels of Triton, which take no structs."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function)]
    return [node for node in found if not any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)]


def parameters(function: Function) -> tuple[int, int]:
    """All parameters, and those that may be given by position."""
    arguments = function.args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    others = [*arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    return positional + len(others), positional


@pytest.mark.parametrize("package", ["napo", "napo_kernels", "benchmarks", "studies"])
def test_no_function_has_more_parameters_than_the_widest_public_one(package: str) -> None:
    wide = [
        f"{file.relative_to(ROOT)}: {function.name} has {parameters(function)[0]}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for function in functions(file)
        if parameters(function)[0] > (MOST_OPTIONS if file.parent.name == "commands" else MOST)
        and file.name != AS_TRANSFORMERS
    ]
    assert not wide, f"more than {MOST} parameters; group them in a dataclass or NamedTuple: {'; '.join(wide)}"


def test_kernels_are_called_with_few_positional_arguments() -> None:
    """Two of many that are swapped still run. The stub lists what Python can call in the compiled module."""
    folders = [ROOT / "napo_kernels" / backend for backend in ("reference", "native", "triton")]
    files = [*(file for folder in folders for file in sorted(folder.rglob("*.py"))), ROOT / "napo_kernels" / "_C.pyi"]
    wide = [
        f"{file.relative_to(ROOT)}: {function.name} takes {parameters(function)[1]}"
        for file in files
        for function in functions(file)
        if parameters(function)[1] > MOST_POSITIONAL
    ]
    assert not wide, f"more than {MOST_POSITIONAL} positional parameters: {'; '.join(wide)}"


# ---- ops ------------------------------------------------------------------------------------------------------------

COLUMNS = {  # the file of an op in each folder
    "reference/": "napo_kernels/reference/{}.py",
    "native/": "napo_kernels/native/{}.py",
    "triton/": "napo_kernels/triton/{}.py",
    "csrc/": "csrc/{}.h",
    "csrc/cpu/": "csrc/cpu/{}.cpp",
    "csrc/cuda/": "csrc/cuda/{}.cu",
    "benchmarks/": "benchmarks/{}.py",
    "tests/napo_kernels/": "tests/napo_kernels/test_{}.py",
}
OPS = sorted(
    {path.stem for path in (ROOT / "napo_kernels" / "ops").iterdir()} - {"__init__", "__pycache__", "registration"}
)


def left_out() -> dict[str, set[str]]:
    """{op: folders without a file of it}, from the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {op: set(re.findall(r"`([^`]+)`", folders)) for op, folders in rows}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_a_file_in_every_column_or_the_reason_why_not(op: str) -> None:
    missing = {folder for folder, file in COLUMNS.items() if not (ROOT / file.format(op)).is_file()}
    assert missing == left_out().get(op, set()), f"{op}: the table in CONTRIBUTING.md says otherwise"


def test_the_table_of_missing_columns_names_ops() -> None:
    assert set(left_out()) <= set(OPS)


# ---- backends -------------------------------------------------------------------------------------------------------

HELPERS = {("linear_sequence_logps", "apply_map")}  # of the reference, which the tests call too
WITHOUT = {  # functions that an op does not call in a backend
    ("napo_loss", "triton"): {"losses", "chosen_gradient"},  # of B numbers each: the op takes the reference's
    ("linear_sequence_logps", "triton"): {"columns_forward", "add_columns"},  # only a CPU cuts the vocabulary in pieces
}


def entry_points(op: str) -> dict[str, dict[str, str]]:
    """{backend: {function that the op may call: its signature}} of the backends that have a module of the op."""
    found = {}
    for backend in ("reference", "native", "triton"):
        file = ROOT / "napo_kernels" / backend / f"{op}.py"
        if file.is_file():
            found[backend] = {
                function.name: f"({ast.unparse(function.args)}) -> {function.returns and ast.unparse(function.returns)}"
                for function in functions(file)
                if not function.name.startswith("_") and (op, function.name) not in HELPERS
            }
    return found


@pytest.mark.parametrize("op", OPS)
def test_backends_of_an_op_have_the_same_functions_with_the_same_signatures(op: str) -> None:
    """An op calls the module of the backend that was chosen, whichever that is."""
    found = entry_points(op)
    everything = {name: text for entries in found.values() for name, text in entries.items()}
    for backend, entries in found.items():
        expected = {name: text for name, text in everything.items() if name not in WITHOUT.get((op, backend), ())}
        assert entries == expected, f"{op}: the functions of {backend} differ from the other backends'"
