"""The border between Python and the compiled module: arguments go over by name, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from napo_kernels import backends
from napo_kernels.native import stub

pytestmark = pytest.mark.skipif(not backends()["cpu"]["available"], reason="the compiled module is missing")


def norm(**changes: Any) -> dict[str, Any]:
    """Arguments of rms_norm_forward, some of them changed; ``x`` and the like are of its struct RmsNormArgs."""
    x = torch.randn(2, 8)
    of_norm = {"dtype": x.dtype, "rows": 2, "width": 8, "x": x, "weight": torch.ones(8)}
    rest = {"eps": 1e-5, "out": torch.zeros(2, 8), "r": torch.zeros(2)}
    of_norm |= {name: changes.pop(name) for name in list(changes) if name in of_norm}
    return {"norm": of_norm, **rest, **changes}


def test_a_mapping_fills_the_struct_by_name() -> None:
    from napo_kernels import _C

    arguments = norm()
    shuffled = dict(reversed(arguments.items()))
    _C.rms_norm_forward(shuffled, False, 1)  # type: ignore[arg-type]
    x = arguments["norm"]["x"]
    torch.testing.assert_close(arguments["out"], torch.nn.functional.rms_norm(x, (8,), eps=1e-5))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epsilon": 1.0}, "rms_norm_forward: RmsNormForwardArgs has no epsilon"),
        ({"rows": 2.0}, "rms_norm_forward: rows: expected an int, got 2.0"),
        ({"rows": 1 << 70}, "rms_norm_forward: rows: expected an int of 64 bits, got 1180591620717411303424"),
        ({"eps": "small"}, "rms_norm_forward: eps: expected a number, got 'small'"),
        ({"r": torch.zeros(2, dtype=torch.float64)}, "r: expected None or a tensor of float32, got torch.float64"),
        ({"x": 7}, "rms_norm_forward: x: expected a tensor, got 7"),
        ({"dtype": torch.float64}, "dtype: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ({"norm": None}, "rms_norm_forward: RmsNormArgs: expected a dict or a NamedTuple, got NoneType"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    from napo_kernels import _C

    with pytest.raises(ValueError, match=message):
        _C.rms_norm_forward(norm(**changes), False, 1)  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    from napo_kernels import _C

    arguments = norm()
    del arguments["norm"]["width"]
    with pytest.raises(ValueError, match="rms_norm_forward: width of RmsNormArgs is missing"):
        _C.rms_norm_forward(arguments, False, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rms_norm_forward: this build has no kernel for CUDA"):
        _C.rms_norm_forward(norm(), True, 0)  # type: ignore[arg-type]


def test_named_tuples_have_the_fields_of_their_structs() -> None:
    from napo_kernels import _C, rows

    for name in ("Targets", "LogitMap"):
        assert getattr(rows, name)._fields == tuple(_C.STRUCTS[name])


def test_the_stub_is_that_of_the_sources() -> None:
    from napo_kernels import _C

    assert stub.FILE.read_text() == stub.text(_C), "run python -m napo_kernels.native.stub"


def test_scratch_that_cannot_be_had_is_a_memory_error() -> None:
    """Whether the kernel asks for it at once or each of its threads does."""
    from napo_kernels import _C

    select: _C.SelectArgs = {
        "users": 1,
        "owners": 1,
        "k": 0,
        "pool_offset": 0,
        "groups": None,
        "pool_groups": None,
        "share": torch.zeros(1, 1, dtype=torch.bool),
    }
    with pytest.raises(MemoryError, match=r"no memory for \d+ bytes of scratch; make the batch smaller"):
        _C.select_nearest({"select": select, "states": None, "pool": None, "width": 1 << 50}, False, 1)
    unmasked = {"full_margin": None, "margin_stride": (0, 0, 0), "full_keep": None, "keep_stride": (0, 0, 0)}
    pair = {"score": None, "states": None, "items": None, "width": 0, "bias": None, "line": None}
    one = torch.zeros(1)
    loss = {"users": 1, "owners": 1, "n": 1 << 50, "beta": 1.0, "rejected": None, "margin": None, "share": None}
    excluded = {"bounds": None, "place": None, "key": None}
    general = {"loss": {**loss, "excluded": excluded}, "first_row": 0, "rows": 1, **unmasked, **pair}
    with pytest.raises(MemoryError, match="of scratch"):
        _C.napo_general_sums({"general": general, "m": one, "rest": one}, False, 2)  # type: ignore[typeddict-item]
