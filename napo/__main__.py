"""Where the command `napo` begins: with one line, and no traceback, where the toolkit is not installed."""

from __future__ import annotations

import sys

from napo.extras import MissingExtra, require


def main() -> None:
    try:
        require("toolkit")
    except MissingExtra as error:
        print(f"napo: {error}", file=sys.stderr)
        sys.exit(1)
    from napo.cli import main as run

    run()


if __name__ == "__main__":
    main()
