"""Machine code of the GPU kernels for sm_90, without a GPU: registers, spills and the width of loads and stores.

    python -m benchmarks code                              the Triton kernels of bf16 logits, and of fp32 ones
    python -m benchmarks code --softcap                    the same with a softcap
    python -m benchmarks code --odd                        the same of a vocabulary that is no multiple of 16
    python -m benchmarks code --loss                       those of napo_loss, separable and with everything
    python -m benchmarks code --catalogue                  those of catalogue_sequence_logps, of bf16 and of fp32 heads
    python -m benchmarks code --set COLUMNS=2048 --warps 4 token_forward_kernel
    python -m benchmarks code --module build/gpu/_C.so     the CUDA C++ kernels of a compiled module

Memory-bound kernels want 16-byte accesses (128) and none of 2 or 4 bytes (16, 32) in their loops. Counts are of
instructions in the code, not of instructions run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = "backends/nvidia/bin"
KERNELS = ("rows_forward_kernel", "rows_gradient_kernel", "token_forward_kernel", "token_backward_kernel")
INT64 = ("start_ptr", "columns_ptr", "labels_ptr", "rows_ptr", "sizes_ptr", "tiles_ptr", "lanes_ptr", "places_ptr")
INT64 += ("pairs_ptr", "pair_places_ptr", "pair_slots_ptr", "sequence_ids_ptr", "entries_ptr", "entry_slots_ptr")
BYTES = ("share_ptr", "full_keep_ptr")
FLOATS = ("scale", "softcap", "lora_scale", "store_scale", "beta")
FLAGS: dict[str, Any] = {"COLUMNS": 4096, "TARGETS": 64, "WIDTH": 256, "STORE": True, "ONE_READ": True}
# Warps and constants of the kernels of catalogue_sequence_logps as launched for bf16; fp32 halves the last of a tile.
CATALOGUE: dict[str, tuple[int, dict[str, Any]]] = {
    "tile_logits_kernel": (4, {"ROWS": 64, "COLUMNS": 128, "DEPTH": 64}),
    "own_logits_kernel": (4, {"LANES": 16, "DEPTH": 256}),
    "slot_stats_kernel": (4, {"COLUMNS": 1024}),
    "sequence_sums_kernel": (4, {"SEQUENCES": 128}),
    "logits_gradient_kernel": (4, {"COLUMNS": 256, "PAIRS": 16}),
    "tile_hidden_kernel": (4, {"ROWS": 64, "WIDTH": 128, "COLUMNS": 32}),
    "own_hidden_kernel": (4, {"COLUMNS": 16, "WIDTH": 256}),
    "tile_weight_kernel": (8, {"COLUMNS": 128, "WIDTH": 128, "NEED_WEIGHT": True, "ROWS": 32}),
    "token_sums_kernel": (4, {"ENTRIES": 16, "NEED_WEIGHT": True, "WIDTH": 256}),
}
LOSS = ("log_sums_kernel", "gradient_kernel")
# What a problem of napo_loss that is not separable may turn on.
FULL = {"FULL_MARGIN": True, "FULL_KEEP": True, "PAIR": True}
DIVISIBLE = ("_ptr", "stride", "stride_s", "stride_t", "padded", "width")
OF_VOCABULARY = ("vocabulary", "chunk")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", default=KERNELS)
    parser.add_argument("--catalogue", action="store_true", help="the kernels of catalogue_sequence_logps")
    parser.add_argument("--loss", action="store_true", help="the kernels of napo_loss")
    parser.add_argument("--softcap", action="store_true", help="logits have a softcap")
    parser.add_argument("--odd", action="store_true", help="the vocabulary is no multiple of 16")
    parser.add_argument("--module", type=Path, default=None, help="a compiled module, in place of the Triton kernels")
    parser.add_argument("--warps", type=int, default=None, help="in place of as many as it is launched with")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="a constant of the kernel")
    options = parser.parse_args(arguments)
    print(f"{'kernel':44} {'registers':>9} {'spills':>6}  loads by bits, stores by bits")
    if options.module is not None:
        for name, sass in functions(options.module).items():
            show(name, sass, resources(options.module).get(name, ("?", "?")))
        return
    given: dict[str, Any] = {name: int(number) for name, _, number in (pair.partition("=") for pair in options.set)}
    if options.softcap:
        given["HAS_CAP"] = True
    for kernel in CATALOGUE if options.catalogue else LOSS if options.loss else options.kernels:
        for what, logits, flags in variants(kernel):
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(compiled(kernel, logits, {**flags, **given}, options.warps, odd=options.odd))
                for name, sass in functions(cubin).items():
                    show(f"{name}, {what}", sass, resources(cubin).get(name, ("?", "?")))


def variants(kernel: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What is shown of a kernel: in words, by the dtype of its logits or operands, and by further constants."""
    if kernel in LOSS:
        return [("separable", "fp32", {}), ("everything", "fp32", FULL)]
    what = "operands" if kernel in CATALOGUE else "logits"
    kinds = ("bf16", "fp32") if kernel.startswith(("rows", "tile")) else ("bf16",)
    return [(f"{kind} {what}", kind, {}) for kind in kinds]


def compiled(
    kernel: str, logits: str, constants: dict[str, Any], warps: int | None = None, *, odd: bool = False
) -> bytes:
    """The machine code of a Triton kernel as it is launched, without a bias, and without a softcap unless ``constants``
    have one; its strides and addresses are multiples of 16, but those it is not compiled anew for. ``odd``: the
    vocabulary is no such multiple, as where tokens were added to it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from napo_kernels.triton import catalogue_sequence_logps, linear_sequence_logps, napo_loss, sequence_logps
    from napo_kernels.triton.softmax_rows import WALK_BLOCK, block_of_logits

    modules = (catalogue_sequence_logps, linear_sequence_logps, napo_loss, sequence_logps)
    function = next(getattr(module, kernel) for module in modules if hasattr(module, kernel))
    launched, flags = 8, dict(FLAGS)
    if kernel == "log_sums_kernel":
        launched, flags = 4, {"ROWS": 1, "BLOCK": 2048}
    if kernel == "gradient_kernel":
        flags = {"ROWS": napo_loss.GRADIENT_ROWS, "BLOCK": napo_loss.GRADIENT_BLOCK}
        launched = napo_loss.GRADIENT_WARPS
    if kernel in CATALOGUE:
        launched, flags = (
            CATALOGUE[kernel][0],
            {**CATALOGUE[kernel][1], "PRECISION": catalogue_sequence_logps.PRECISION},
        )
        if logits == "fp32":
            flags[list(CATALOGUE[kernel][1])[-1]] //= 2
    if kernel == "rows_forward_kernel":
        flags["COLUMNS"] = block_of_logits(WALK_BLOCK, bool(constants.get("HAS_CAP")))
    if kernel == "token_forward_kernel":
        flags["COLUMNS"] = WALK_BLOCK
    divisible = DIVISIBLE if odd else DIVISIBLE + OF_VOCABULARY
    signature, values, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[name] = "constexpr", constants.get(name, flags.get(name, False))
            continue
        if name.endswith("_ptr"):
            signature[name] = f"*{pointer_kind(name, logits, kernel)}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith(divisible) and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": launched if warps is None else warps}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code: bytes = built.asm["cubin"]
    return code


def pointer_kind(pointer: str, logits: str, kernel: str) -> str:
    """``logits``: the dtype of logits, and of the catalogue's operands."""
    if pointer in INT64:
        return "i64"
    if kernel in LOSS:
        return "u8" if pointer in BYTES else "fp32"
    if kernel in CATALOGUE:
        return logits if pointer in ("hidden_ptr", "weight_ptr", "out_ptr", "weight_out_ptr") else "fp32"
    return {"logits_ptr": logits, "out_ptr": "bf16"}.get(pointer, "fp32")


def tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / TOOLS
    return subprocess.run([str(folder / name), *arguments], capture_output=True, text=True, check=True).stdout


def functions(binary: Path) -> dict[str, list[str]]:
    """The instructions of every kernel."""
    found: dict[str, list[str]] = {}
    for line in tool("cuobjdump", "--dump-sass", str(binary)).splitlines():
        head = re.match(r"\s*Function : (\S+)", line)
        if head:
            body = found.setdefault(head[1], [])
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\S+)", line)
        if found and instruction:
            body.append(instruction[1].rstrip(";"))
    return found


def resources(binary: Path) -> dict[str, tuple[str, str]]:
    """Registers and bytes of stack of every kernel."""
    text = tool("cuobjdump", "--dump-resource-usage", str(binary))
    pairs = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", text)
    return {name: (registers, stack) for name, registers, stack in pairs}


def show(name: str, sass: list[str], usage: tuple[str, str]) -> None:
    counts: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction in sass:
        kind, *modifiers = instruction.split(".")
        if kind in counts:
            sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
            counts[kind][next((sizes[m] for m in modifiers if m in sizes), 32)] += 1
    text = ["  ".join(f"{bits}: {count}" for bits, count in sorted(counts[kind].items())) for kind in ("LDG", "STG")]
    print(f"{name[:44]:44} {usage[0]:>9} {usage[1]:>6}  [{text[0]}]  [{text[1]}]  {len(sass)} instructions")
