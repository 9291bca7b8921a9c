"""The command `napo` begins here. Without the toolkit it says so in one line, with no traceback."""

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
