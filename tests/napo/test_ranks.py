"""Commands under torchrun: two ranks train one model, one writes, both agree."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from run_kills import ended, fork
from safetensors.torch import load_file

from napo import cli, ranks
from napo.command_line.flags import options_by_name
from napo.files import read_json
from napo.runs import Run

FEW = ["--users", "16", "--negatives", "3", "--learning-rate", "0.01", "--threads", "1"]


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


def test_two_ranks_fine_tune(base: Path, small_world: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "two")
    common = ("--data", tmp_path / "two" / "data", "--run-dir", tmp_path / "two" / "run", "--threads", 1)
    sft = ("sft", *common, "--model", small_world / "model", "--name", "more", "--examples", 16, "--val-examples", 4)
    codes, said = under_torchrun(tmp_path, *sft)
    assert codes == [0, 0], said
    log = read_json(Run(tmp_path / "two" / "run").adapter("more") / "log_history.json")
    assert max(entry["step"] for entry in log) == 2  # 16 windows, 2 ranks of 4
    codes, said = under_torchrun(tmp_path, "sasrec", *common)
    assert codes == [1, 1] and "runs in one process, got 2 ranks" in said[0]


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
