"""Run by test_signals: one process imports everything, then every command is a fork that a signal may end.

For each stage a whole run, then runs that are ended at random moments and started again with the same command.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from napo import cli
from napo.finetuning import callbacks, preferences, sft
from napo.identity import adapter_hash

SETS = {
    "sft": ["examples=240", "val_examples=8", "learning_rate=0.01", "distill=0.5", 'lora={"dropout": 0.1}'],
    "train": ["users=48", "negatives=3", "batch_size=2", "learning_rate=0.01"],
}
STAGE_OF = {"sft": "sft", "train": "napo"}
IMPORTED = (preferences, sft)  # here, so that the forks need not


def fork(work: Callable[[], None], log: Path) -> int:
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = int(str(end.code))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(stage: str, run: Path, data: str, model: str) -> Callable[[], None]:
    sys_argv = ["napo", stage, "--data", data, "--run", str(run), "--threads", "1"]
    sys_argv += ["--model", model] if stage == "sft" else ["--init-from", "start"]
    sys_argv += [part for option in SETS[stage] for part in ("--set", option)]

    def work() -> None:
        callbacks.CHECKPOINT_SECONDS = 0.05  # so that kills find some
        sys.argv = sys_argv
        cli.main()

    return work


if __name__ == "__main__":
    base, data, model, target, moments = (
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        Path(sys.argv[4]),
        int(sys.argv[5]),
    )
    torch.set_num_threads(1)
    draw = random.SystemRandom()
    report: dict[str, Any] = {}
    for stage, name in STAGE_OF.items():
        began = time.monotonic()
        run = target / f"{stage}-whole"
        shutil.copytree(base, run)
        whole = ended(fork(command(stage, run, data, model), target / f"{stage}-whole.log"))
        seconds = time.monotonic() - began
        report[stage] = {"whole": whole, "seconds": seconds, "weights": adapter_hash(run / "models" / name), "ends": []}
        for number in range(moments):
            run = target / f"{stage}-{number}"
            shutil.copytree(base, run)
            kind = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[number % 3]
            moment = draw.uniform(0.1, 1.0) * seconds
            log = target / f"{stage}-{number}.log"
            child = fork(command(stage, run, data, model), log)
            time.sleep(moment)
            os.kill(child, kind)
            end = {"signal": kind, "moment": moment, "first": ended(child), "said": log.read_text()}
            end["saved"] = len(list(run.glob(f".working/{name}/models/.*.work/checkpoint-*")))
            end["again"] = ended(fork(command(stage, run, data, model), log))
            end["told"] = "goes on after step" in log.read_text()
            end["weights"] = adapter_hash(run / "models" / name) if end["again"] == 0 else log.read_text()
            end["left"] = sorted(path.name for path in run.glob(".working/*"))
            report[stage]["ends"].append(end)
    (target / "report.json").write_text(json.dumps(report, indent=1))
