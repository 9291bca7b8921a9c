"""Runs several benchmarks so that they take turns: after each case the next benchmark goes on.

    python benchmarks/by_turns.py "bench_napo_loss.py --budget 95" "bench_evaluation.py --budget 50"

One process runs at a time, all others are stopped. So the runs of every case are spread over the time of all of them,
and a minute in which the machine is slow falls on a part of each instead of the whole of one. A benchmark that fails
does not stop the others; the exit status is 1 then. Memory adds up: some 6 GB beside that of the largest variant.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from turns import BY_TURNS

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="a file of benchmarks/ and its arguments")
    os.environ[BY_TURNS] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    waiting = [shlex.split(command) for command in parser.parse_args().commands]
    processes: list[subprocess.Popen[bytes]] = []
    failed = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nobody is left stopped
    try:
        # Each one begins when its first turn comes, so that none loads its libraries beside another's measurement.
        while waiting or processes:
            process = begin(waiting.pop(0)) if waiting else processes.pop(0)
            processes.append(process)
            status = turn(process)
            if status is not None:
                processes.remove(process)
                if status != 0:
                    failed.append(f"{process.args[1]}: exit status {status}")  # type: ignore[index]
    finally:
        for process in processes:
            process.kill()
    if failed:
        raise SystemExit("\n".join(failed))


def begin(command: list[str]) -> subprocess.Popen[bytes]:
    """In a process group of its own: one with stopped processes is hung up when the shell that began it ends, and these
    are to be hung up when we end."""
    script, *arguments = command
    return subprocess.Popen([sys.executable, str(HERE / script), *arguments], preexec_fn=os.setpgrp)


def turn(process: subprocess.Popen[bytes]) -> int | None:
    """Lets a process run until it stops itself (None) or ends (its exit status)."""
    process.send_signal(signal.SIGCONT)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


if __name__ == "__main__":
    main()
