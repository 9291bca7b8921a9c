"""What training commands do beside training: ranks that agree, an end in time, reports to others."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from run_kills import ended, fork
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from napo import cli, ranks
from napo.command_line.flags import options_by_name
from napo.evaluation import catalogue, parts
from napo.files import read_json
from napo.finetuning import callbacks
from napo.finetuning.callbacks import TimedCosine
from napo.finetuning.reporting import checked_reporters
from napo.options import UsageError
from napo.runs import Run

FEW = ["--no-prefixes", "--users", "16", "--negatives", "3", "--learning-rate", "0.01", "--threads", "1"]


def call(*arguments: object) -> None:
    sys.argv = ["napo", *map(str, arguments)]
    cli.main()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def under_torchrun(folder: Path, *arguments: object) -> tuple[list[int], list[str]]:
    """Exit codes and what was said, of two ranks with the environment that torchrun gives them."""
    address = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def work(rank: int) -> None:
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        sys.stdout = sys.stderr = logs[rank].open("a", buffering=1)  # not what pytest captures
        call(*arguments)

    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    children = [fork(lambda rank=rank: work(rank), logs[rank]) for rank in range(2)]  # type: ignore[misc]
    return [ended(child) for child in children], [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def base(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` and a ``run`` with SASRec and SFT. Made in a fork: here no process group may begin before the ranks'."""
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA: its autograd has threads for devices, which do not outlive a fork")
    folder = tmp_path_factory.mktemp("ranks")
    run = ["--data", folder / "data", "--run", folder / "run", "--threads", 1]

    def work() -> None:
        sizes = ["--min-user", 2, "--min-item", 1, "--set", "test_users=20", "--set", "val_users=10"]
        for command in (
            ["prepare", "recbole", small_world / "files", "--out", folder / "data", *sizes],
            ["sasrec", *run, "--max-epochs", 1, "--dim", 8],
            ["sft", *run, "--model", small_world / "model", "--examples", 16, "--val-examples", 4],
        ):
            try:
                call(*command)
            except SystemExit as end:
                assert end.code == 0, command

    assert ended(fork(work, folder / "base.log")) == 0, (folder / "base.log").read_text()
    return folder


def test_two_ranks_train_what_one_process_trains(base: Path, tmp_path: Path) -> None:
    """Ranks of 2 users are one process with 4: the same steps, the same pool of negatives."""
    shutil.copytree(base, tmp_path / "one")
    shutil.copytree(base, tmp_path / "two")
    train = [
        [*("train", "--data", tmp_path / name / "data", "--run-dir", tmp_path / name / "run")]
        for name in ("one", "two")
    ]
    assert ended(fork(lambda: call(*train[0], *FEW, "--batch-size", 4), tmp_path / "one.log")) == 0
    codes, said = under_torchrun(tmp_path, *train[1], *FEW, "--batch-size", 2)
    assert codes == [0, 0], said
    runs = [Run(tmp_path / name / "run") for name in ("one", "two")]
    weights = [load_file(run.adapter("napo") / "adapter_model.safetensors") for run in runs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
    logs = [[e["loss"] for e in read_json(run.adapter("napo") / "log_history.json") if "loss" in e] for run in runs]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert "napo: " in said[0] and "napo: " not in said[1]  # one of them says what was done
    assert not (tmp_path / "two" / "run" / ".working").exists()

    codes, said = under_torchrun(tmp_path, *train[1], *FEW, "--batch-size", 2)
    assert codes == [0, 0] and "napo: finished before" in said[0]
    codes, said = under_torchrun(tmp_path, *train[1], *FEW, "--batch-size", 3)
    assert codes == [1, 1] and "made with other options (batch_size 2 -> 3)" in said[0] and said[1] == ""


@pytest.mark.parametrize(
    ("examples", "options"),
    [
        (29, ["--distill", 0.5]),  # 4 and 1 are left for the last step
        (19, ["--normalise", "vocabulary"]),  # 3 and none
        (26, ["--loss-on", "answer", "--normalise", "vocabulary"]),
    ],
    ids=["soft targets", "windows", "answers"],
)
def test_two_ranks_fine_tune_what_one_process_does(
    examples: int, options: list[object], base: Path, small_world: Path, tmp_path: Path
) -> None:
    """Ranks of 4 examples are one process with 8, whose tokens count alike, wherever they are computed; and once, where
    the last step is filled up with the first of them."""
    shutil.copytree(base, tmp_path / "run")
    common = ("--data", tmp_path / "run" / "data", "--run-dir", tmp_path / "run" / "run", "--threads", 1)
    sft = ("sft", *common, "--model", small_world / "model", "--examples", examples, "--val-examples", 7)
    sft += (*options, "--learning-rate", 0.01, "--evaluations", 3)
    alone = fork(lambda: call(*sft, "--name", "one", "--batch-size", 8), tmp_path / "one.log")
    assert ended(alone) == 0, (tmp_path / "one.log").read_text()
    codes, said = under_torchrun(tmp_path, *sft, "--name", "two", "--batch-size", 4)
    assert codes == [0, 0], said
    assert "Could not locate" not in said[1]  # the best checkpoint
    adapters = [Run(tmp_path / "run" / "run").adapter(name) for name in ("one", "two")]
    logs = [read_json(adapter / "log_history.json") for adapter in adapters]
    assert max(entry["step"] for entry in logs[1]) == math.ceil(examples / 8)
    for figure in ("loss", "eval_loss"):
        one, two = ([entry[figure] for entry in log if figure in entry] for log in logs)
        assert two == pytest.approx(one, rel=1e-5)
    weights = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_command_of_one_process_refuses_ranks(base: Path, tmp_path: Path) -> None:
    codes, said = under_torchrun(tmp_path, "sasrec", "--data", base / "data", "--run-dir", base / "run")
    assert codes == [1, 1] and "runs in one process, got 2 ranks" in said[0]


def test_two_ranks_judge_what_one_process_judges(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 4)  # 5 parts of 17 rows: 3 for one rank and 2 for the other
    monkeypatch.setattr(catalogue, "BLOCK", 4)
    judged = {}
    for name in ("one", "two"):
        shutil.copytree(base, tmp_path / name)
        evaluate = [*("evaluate", "--data", tmp_path / name / "data", "--run-dir", tmp_path / name / "run")]
        evaluate += ["--models", "sasrec,sft", "--limit", 17, "--threads", 1, "--catalogue", "--retrieve", 9]
        if name == "one":
            alone = fork(lambda evaluate=evaluate: call(*evaluate), tmp_path / "one.log")  # type: ignore[misc]
            assert ended(alone) == 0, (tmp_path / "one.log").read_text()
        else:
            codes, said = under_torchrun(tmp_path, *evaluate)
            assert codes == [0, 0], said
            for words in ("hr@1", "the whole catalogue", "sasrec's first 9"):
                assert words in said[0].lower() and words not in said[1].lower()
        run = tmp_path / name / "run"
        found = read_json(run / "catalogue.json")
        records = [{**record, "seconds": None} for record in (*read_json(run / "metrics.json"), *found["records"])]
        frames = [pd.read_parquet(run / f"{one}.parquet") for one in ("predictions/sasrec", "predictions/sft")]
        frames += [pd.read_parquet(run / f"{one}.parquet") for one in ("catalogue/sasrec", "catalogue/sft")]
        judged[name] = records, found["differences"], frames
        assert not (run / ".working").exists()
    assert judged["two"][:2] == judged["one"][:2]
    for two, one in zip(judged["two"][2], judged["one"][2], strict=True):
        pd.testing.assert_frame_equal(two, one)


def test_training_ends_in_time_with_its_schedule_finished(base: Path, small_world: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    common = ("--data", tmp_path / "copy" / "data", "--run", run, "--threads", 1)
    long = ("sft", *common, "--model", small_world / "model", "--name", "timed", "--epochs", 300, "--max-minutes", 0.05)

    def work() -> None:
        sys.stdout = sys.stderr = (tmp_path / "log").open("a", buffering=1)
        ticks = itertools.count()
        callbacks.time = SimpleNamespace(monotonic=lambda: 0.01 * next(ticks))  # so many looks at the clock end it
        call(*long, "--report-to", "tensorboard")

    assert ended(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    log = read_json(Run(run).adapter("timed") / "log_history.json")
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert 20 < max(entry["step"] for entry in log) <= 300  # of thousands: each step looks at the clock
    assert max(rates) > 10 * rates[-1]
    assert "eval_loss" in [key for entry in log for key in entry]  # the last weights could be the best
    said = (tmp_path / "log").read_text()
    assert "--max-minutes ends the training in 3 s, before all are done" in said
    assert list((run / "logs" / "timed").glob("events.out.tfevents*"))


def test_reporters_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="report-to: expected one of tensorboard, wandb, trackio; got 'mlflow'"):
        checked_reporters("tensorboard,mlflow")
    monkeypatch.setattr("napo.finetuning.reporting.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ValueError, match="report-to: wandb is not installed; run `pip install wandb`"):
        checked_reporters("trackio, wandb")
    assert checked_reporters("trackio,") == ("trackio",)


def test_the_schedule_follows_steps_or_time() -> None:
    schedule = TimedCosine(steps=100, warmup=0.1, seconds=60.0)
    assert schedule(0) == 0 and schedule(5) == pytest.approx(0.5) and schedule(10) == 1.0
    assert schedule(55) == pytest.approx(0.5) and schedule(100) == 0.0
    schedule.used = 33.0  # 55% of the time, in 7 steps
    assert schedule(7) == pytest.approx(0.5)
    schedule.used = 61.0
    assert schedule(8) == 0.0


def test_time_used_is_kept_in_checkpoints() -> None:
    def scheduler() -> tuple[TimedCosine, LambdaLR]:
        schedule = TimedCosine(steps=100, warmup=0.1, seconds=60.0)
        return schedule, LambdaLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), schedule)

    schedule, first = scheduler()
    schedule.used = 33.0
    again, second = scheduler()
    second.load_state_dict(first.state_dict())
    assert again.used == 33.0


def test_one_process_is_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # left by a scheduler that started one process
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (ranks.rank(), ranks.size(), ranks.largest(1, 2), ranks.told(lambda: 5)) == (0, 1, [1, 2], 5)


def test_flags_are_no_abbreviations_of_torchruns() -> None:
    """torchrun reads all arguments for abbreviations of its own: --run, of its --run-path, has a second name."""
    from torch.distributed.run import get_args_parser

    start = ["--nproc-per-node", "2", "-m", "napo.cli", "train"]
    with pytest.raises(SystemExit):
        get_args_parser().parse_args([*start, "--run", "r"])
    names = {name for stage in ("sft", "train") for name, _ in options_by_name(stage)}
    flags = [
        "run-dir",
        "data",
        "seed",
        "model",
        "style",
        "name",
        "init-from",
        "overwrite",
        "threads",
        "objective",
        "set",
    ]
    flags += ["config", "entry", *(name.replace(".", "-").replace("_", "-") for name in names)]
    for flag in flags:
        found = get_args_parser().parse_args([*start, f"--{flag}", "r"])
        assert found.training_script_args == ["train", f"--{flag}", "r"]
