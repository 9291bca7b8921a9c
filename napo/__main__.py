"""The command `napo` begins here. Without the toolkit it says so in one line, with no traceback; `napo info` shows the
backends of the kernels all the same."""

from __future__ import annotations

import runpy
import sys

from napo.extras import MissingExtra, require
from napo.program import call
from napo.signals import end_at_signals


def main() -> None:
    end_at_signals(f"napo: stopped before it began; to begin again: {call(sys.argv[1:])}")
    try:
        require("toolkit")
    except MissingExtra as error:
        asked = sys.argv[1:] == ["info"]
        if asked:
            runpy.run_module("napo_kernels", run_name="__main__")
        print(f"napo: {error}", file=sys.stderr)
        sys.exit(0 if asked else 1)
    from napo.cli import main as run

    run()


if __name__ == "__main__":
    main()
