"""Another build of the compiled module under the tests, by the environment: ``NAPO_TEST_MODULE`` is its file, and
``NAPO_TEST_THREADS`` the threads that its kernels get, whatever torch has."""

from __future__ import annotations

import importlib.util
import os
import sys


def take() -> None:
    """To be called before anything imports the module."""
    path = os.environ.get("NAPO_TEST_MODULE")
    if path is None:
        return
    name = "napo_kernels._C"
    assert name not in sys.modules, "the usual module is loaded already"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    # A module that is not taken would leave everything to the reference, and every test would pass.
    from napo_kernels.dispatch import compiled, why_not
    from napo_kernels.native import calls

    assert compiled() is module and why_not("cpu") is None, why_not("cpu")
    threads = os.environ.get("NAPO_TEST_THREADS")
    if threads is not None:
        calls.where = lambda tensor: (False, int(threads))  # type: ignore[assignment]
