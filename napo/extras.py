"""The packages that parts of napo need beside torch and numpy, by the names of ``pip install '.[NAME]'`` in a clone.

No package index has napo: ``pip install 'napo[NAME]'`` finds nothing, or what a stranger puts there."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "toolkit": ("accelerate", "pandas", "peft", "pyarrow", "rich", "safetensors", "transformers", "typer", "yaml"),
    "report": ("jinja2", "plotly"),
    "serve": ("fastapi", "uvicorn"),
    "demo": ("gguf", "jinja2", "plotly"),
}
"""{extra: the modules that its part of the code imports}"""


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says which one, and what to do."""


def missing(extra: str) -> list[str]:
    """The modules of ``extra`` that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require(extra: str) -> None:
    """Raise MissingExtra if modules of ``extra`` are missing. Call it before the first of them is imported."""
    names = missing(extra)
    if names:
        raise MissingExtra(
            f"{', '.join(names)}: not installed, and this part of napo needs {'it' if len(names) == 1 else 'them'}; "
            f"in the clone: pip install '.[{extra}]'"
        )
