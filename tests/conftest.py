"""Where the tests of the GPU run: on the GPU, or in a dry run of `make gpu-check GPU_DEVICE=cpu` on the CPU; and the
compiled module in its place where the environment names another, as `make test-asan` does."""

from __future__ import annotations

import os

import other_module
import pytest
import torch

other_module.take()
DRY = os.environ.get("NAPO_GPU_TESTS_ON") == "cpu"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """On what the tests of the GPU run, and which backends can: where it is asked for (-v)."""
    from napo_kernels import backends

    lines = [f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties()
        lines[0] += f", {facts.name}, {facts.multi_processor_count} SMs, cuDNN {torch.backends.cudnn.version()}"
    for name, row in backends().items():
        lines.append(f"backend {name}: {row['why_not'] or 'available'}")
    return lines


@pytest.fixture
def device() -> torch.device:
    """The GPU. In a dry run the CPU: that shows that a test runs, and nothing about a GPU."""
    if DRY:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible to torch")
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.fail(f"an earlier test of this process left the device in an error state: {str(error).splitlines()[0]}")
    return torch.device("cuda")


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """A backend of the GPU; in a dry run one of the CPU in its place."""
    return {"triton": "reference", "cuda": "cpu"}[request.param] if DRY else request.param
