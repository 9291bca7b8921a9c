"""Whoever trained for hours must not lose it: typos, names, other options, failures, two writers, old formats."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_calls import Call
from safetensors.torch import load_file, save_file

from napo.evaluation.report import table_text
from napo.files import content_hash, read_json, write_json
from napo.identity import adapter_hash, model_identity
from napo.runs import Origin, Run

NAMES = (
    "..",
    ".",
    "../../data",
    "a/b",
    "/tmp/x",
    "",
    "a b",
    "x\n",
    ".hidden",
    "é",
    "x" * 101,
    "sasrec",
    "base",
    "prepare",
)
NAMES += ("evaluate-napo",)


@pytest.fixture
def run(demo_run: Run, tmp_path: Path) -> Run:
    """A finished run with its prepared data beside it."""
    shutil.copytree(demo_run.path, tmp_path / "run")
    shutil.move(tmp_path / "run" / "data", tmp_path / "data")
    (tmp_path / "run" / "stages" / "prepare.json").unlink()
    copy = Run(tmp_path / "run")
    copy.configure(data="../data")
    return copy


@pytest.fixture
def model(small_world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_world / "model", tmp_path / "model"))


def fails(result: tuple[int, str, str], pattern: str, code: int = 1) -> None:
    assert result[0] == code, result
    assert result[2].count("\n") == 1 and re.search(pattern, result[2]), result[2]


def common(run: Run) -> list[object]:
    return ["--data", run.path.parent / "data", "--run", run.path]


def test_a_typo_costs_nothing(napo: Call, run: Run) -> None:
    before = content_hash(run.path.parent)
    fails(napo("sasrec", *common(run), "--set", "max_epoch=5"), "max_epoch: no such option", 2)
    fails(napo("train", *common(run), "--set", "negative=4"), "negative: no such option", 2)
    fails(napo("sft", *common(run), "--set", "epoch=1"), "epoch: no such option", 2)
    fails(napo("sft", *common(run), "--set", 'lora={"rank": 4}'), "rank: no such option", 2)
    fails(napo("sft", *common(run), "--set", "tokens=many"), "tokens: expected a whole number or null, got 'many'", 2)
    fails(napo("sft", *common(run), "--set", "epochs=False"), "epochs: expected a number, got False", 2)
    fails(napo("train", *common(run), "--set", "exact=1"), "exact: expected true or false, got 1", 2)
    fails(napo("sasrec", *common(run), "--set", "dim=.5"), "dim: expected a whole number, got 0.5", 2)
    fails(napo("sft", *common(run), "--set", "loss_on=all"), "loss_on: expected sequences, answer, titles", 2)
    fails(
        napo("sft", "--data", run.path.parent / "data", "--run", run.path.parent / "new", "--set", "epoch=1"),
        "epoch",
        2,
    )
    assert content_hash(run.path.parent) == before and not (run.path.parent / "new").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_path_and_no_stage(napo: Call, run: Run, name: str) -> None:
    before = content_hash(run.path.parent)
    fails(napo("train", *common(run), "--name", name or "''"), "name: ")
    fails(napo("sft", *common(run), "--name", name or "''"), "name: ")
    if name:
        fails(napo("train", *common(run), "--init-from", name), "has no model")
    assert content_hash(run.path.parent) == before


def test_a_model_does_not_replace_what_it_is_trained_from(napo: Call, run: Run) -> None:
    before = content_hash(run.path.parent)
    fails(napo("train", *common(run), "--name", "sft", "--overwrite"), "'sft' is what another stage is called")
    longer = ("--name", "sft-longer", "--init-from", "sft-longer", "--overwrite")
    fails(napo("train", *common(run), *longer), "'sft-longer' is what sft-longer is trained from, or is it")
    fails(napo("sft", *common(run), "--init-from", "sft-longer", "--overwrite"), "'sft' is what sft-longer is trained")
    assert content_hash(run.path.parent) == before


def test_prepare_replaces_no_run_and_no_folder_of_others(
    napo: Call, run: Run, small_world: Path, tmp_path: Path
) -> None:
    before = content_hash(run.path)
    source = ("prepare", "recbole", small_world / "files", "--set", "min_user=2", "--set", "min_item=1")
    fails(napo(*source, "--out", run.path), "holds .*, so it is no prepared data set to be replaced")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    fails(napo(*source, "--out", tmp_path / "data"), r"holds notes\.txt, so it is no prepared data set")
    assert content_hash(run.path) == before and (tmp_path / "data" / "notes.txt").read_text() == "mine"
    fails(napo(*source, "--out", small_world / "model"), "is no prepared data set")
    (tmp_path / "data" / "notes.txt").unlink()
    assert napo(*source, "--out", tmp_path / "data")[0] == 0


def test_a_folder_that_is_no_run_is_left_alone(napo: Call, run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "sasrec").mkdir(parents=True)
    (tmp_path / "work" / "sasrec" / "main.py").write_text("mine")
    before = content_hash(tmp_path)
    data = ("--data", tmp_path / "data", "--run")
    fails(napo("sasrec", *data, tmp_path / "work"), "is no run and not empty")
    fails(napo("sasrec", *data, model), r"is no run, or one of an older napo \(its config\.json says format none")
    fails(napo("sasrec", *data, tmp_path / "data"), "is no run and not empty")
    assert content_hash(tmp_path) == before


def test_other_options_replace_nothing_unless_asked(napo: Call, run: Run, small_world: Path) -> None:
    options = read_json(run.path / "stages" / "sft.json")["options"]["options"]
    sets = [f"--set={name}={json.dumps(value)}" for name, value in options.items()]
    again = ("sft", *common(run), "--model", small_world / "model")
    code, out, _ = napo(*again, *sets)
    assert code == 0 and "sft: finished before" in out
    before = content_hash(run.path)
    changed = r"made with other options \(examples none -> 32\); pass --overwrite"
    fails(napo(*again, *sets, "--set", "examples=32"), changed)
    fails(napo(*again, *sets, "--seed", 3), r"other options \(seed 0 -> 3\).*, or give another --name or --run$")
    fails(napo("sasrec", *common(run), "--seed", 3), r"other options \(seed 0 -> 3.*\).*, or give another --run$")
    fails(
        napo("train", *common(run), "--objective", "sdpo", "--name", "napo"), "other options .*objective napo -> sdpo"
    )
    assert content_hash(run.path) == before
    kept = adapter_hash(run.path / "models" / "sft")
    assert napo(*again, *sets, "--set", "examples=32", "--overwrite")[0] == 0
    assert adapter_hash(run.path / "models" / "sft") != kept
    assert Origin.read(run.path / "models" / "sft").options["examples"] == 32


def test_a_default_that_is_given_is_no_other_option(napo: Call, run: Run, small_world: Path) -> None:
    made = {stage: read_json(run.path / "stages" / f"{stage}.json")["options"] for stage in ("sasrec", "sft", "napo")}
    sets = {
        stage: [f"--set={name}={json.dumps(value)}" for name, value in options["options"].items()]
        for stage, options in made.items()
    }
    sft = ("sft", *common(run), "--model", small_world / "model", *sets["sft"])
    for stage, command in (
        ("sasrec", ("sasrec", *common(run), *sets["sasrec"], "--heads", 2, "--set", "loss=auto")),
        ("sft", (*sft, "--distill", 0, "--set", "lora.r=16", "--epochs", 1, "--set", "val_lists=0")),
        ("napo", ("train", *common(run), *sets["napo"], "--sft-weight", 0, "--set", "beta=null")),
    ):
        code, out, err = napo(*command)
        assert code == 0 and f"{stage}: finished before" in out, err
    fails(napo(*sft, "--epochs", 2), r"was made with other options \(epochs 1.0 -> 2\); pass --overwrite")


def test_a_failure_costs_nothing(napo: Call, run: Run, small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_hash(run.path)
    for stage, where in (("sft", "napo.finetuning.sft"), ("train", "napo.finetuning.preferences")):

        def full(trainer: Any, folder: Path, chosen: Any, *, keep: bool) -> Path:
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(f"{where}.finish", full)
        result = napo(stage, *common(run), "--set", f"{'examples' if stage == 'sft' else 'users'}=16", "--overwrite")
        fails(result, "No space left" if stage == "train" else "No space left|is not, or no longer|model: ")
    monkeypatch.undo()
    assert content_hash(run.path) == before
    assert napo("evaluate", *common(run), "--models", "sft,napo")[0] == 0


def test_one_writer_at_a_time(napo: Call, run: Run) -> None:
    code = (
        "import sys; from napo.runs import Run\n"
        f"with Run({str(run.path)!r}).writing():\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    holder = rf"process {other.pid} on {re.escape(socket.gethostname())} is writing into"
    for command in (("sasrec", "--set", "dim=8"), ("train",), ("evaluate",)):
        fails(napo(command[0], *common(run), *command[1:]), holder)
    other.kill()
    other.communicate()
    with run.writing(), run.writing():  # the lock of a dead process is free, and one's own is no obstacle
        pass


def test_notes_of_two_processes_are_both_kept(tmp_path: Path) -> None:
    children = []
    for which in range(2):
        child = os.fork()
        if child == 0:
            for number in range(30):
                Run(tmp_path / "run").configure(**{f"key{which}": number})
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert Run(tmp_path / "run").config == {"format": 2, "key0": 29, "key1": 29}


def test_formats_of_other_versions_are_refused(napo: Call, run: Run) -> None:
    for found, pattern in (
        (99, "format 99, of a newer napo; .* update napo"),
        (1, r"older napo \(.*format 1; expected 2\); begin another run folder, or read this one with the napo that"),
        (None, "no run, or one of an older napo .*; begin another run folder"),
    ):
        write_json(run.path / "config.json", {"format": found} if found else {"model": "x", "style": "history"})
        before = content_hash(run.path)
        for command in (
            ("report", run.path, "--out", run.path.parent / "r.html"),
            ("sft", *common(run), "--overwrite"),
            ("train", *common(run)),
            ("combine", *common(run)),
            ("evaluate", *common(run)),
            ("recommend", "--run", run.path, "--user", "1"),
            ("serve", "--run", run.path, "--port", "0"),
            ("export", "--run", run.path, "--out", run.path.parent / "exported"),
        ):
            fails(napo(*command), pattern)
        assert content_hash(run.path) == before and not (run.path.parent / "exported").exists()
    (run.path / "config.json").write_text("[]")
    fails(napo("train", *common(run)), "is no run")


def test_weights_overwritten_in_place_are_another_model(napo: Call, run: Run, model: Path, tmp_path: Path) -> None:
    """Same names, same sizes, other weights: SFT and what was judged are made anew, and old adapters are refused."""
    new = Run(tmp_path / "new")
    small = ["--set", "examples=32", "--set", "val_examples=8", "--set", "batch_size=16"]
    data = ["--data", tmp_path / "data", "--run", new.path]
    sft = ("sft", *data, "--model", model, *small)
    judge = ("evaluate", *data, "--models", "base,sft", "--no-greedy")
    assert napo(*sft)[0] == napo(*judge)[0] == 0
    first, figures = adapter_hash(new.path / "models" / "sft"), (new.path / "predictions" / "base.parquet").read_bytes()
    identity = model_identity(str(model))
    weights = load_file(model / "model.safetensors")
    times = (model / "model.safetensors").stat()
    save_file(
        {name: torch.randn_like(t) * 0.3 for name, t in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_identity(str(model)) != identity
    fails(napo(*judge), "is not the model any more that sft was trained on; train sft again")
    code, out, _ = napo(*sft)
    assert code == 0 and "finished before" not in out
    code, out, _ = napo(*judge)
    assert code == 0 and "finished before" not in out
    assert adapter_hash(new.path / "models" / "sft") != first
    assert (new.path / "predictions" / "base.parquet").read_bytes() != figures


def test_an_adapter_is_trained_on_with_its_own_base(napo: Call, run: Run, model: Path) -> None:
    config = read_json(model / "config.json")
    write_json(model / "config.json", config | {"rope_theta": 5000.0})
    result = napo("sft", *common(run), "--name", "more", "--init-from", "sft", "--model", model)
    fails(result, "is not, or no longer, the model that the adapter to start from was trained on")


def test_how_it_was_made_lives_with_each_model(napo: Call, run: Run, small_world: Path) -> None:
    few = ["--set", "examples=16", "--set", "val_examples=8"]
    sft = ("sft", *common(run), "--model", small_world / "model", "--name", "lists", "--style", "candidates", *few)
    assert napo(*sft)[0] == 0
    origins = {name: Origin.read(run.adapter(name)) for name in run.model_names()}
    assert (origins["lists"].style, origins["sft"].style, origins["napo"].style) == ("candidates", "history", "history")
    assert origins["napo"].parent == "sft" and origins["napo"].parent_sha256 == adapter_hash(run.adapter("sft"))
    assert {"model", "style", "history", "seed"}.isdisjoint(run.config)
    assert napo("evaluate", *common(run), "--models", "lists,napo", "--no-greedy", "--overwrite")[0] == 0
    prompts = {r["model"]: r["protocol"].get("prompt") for r in read_json(run.path / "metrics.json")}
    assert (prompts["lists"], prompts["napo"]) == ("candidates", "history")
    before = content_hash(run.path)
    fails(napo("sft", *common(run), "--model", small_world / "none", "--name", "other"), "model: no such folder")
    assert content_hash(run.path) == before


def test_a_stale_parent_shows_in_the_table(napo: Call, run: Run, small_world: Path) -> None:
    assert "†" not in table_text(run)
    few = ["--set", "examples=16", "--set", "val_examples=8", "--overwrite"]
    assert napo("sft", *common(run), "--model", small_world / "model", *few)[0] == 0
    text = table_text(run)
    assert (
        re.search(r"^napo † ", text, flags=re.M)
        and "napo: sft was trained again after napo was trained from it" in text
    )
    assert "sft: trained again, or removed, after it was evaluated" in text
    notes = [line for line in text.splitlines() if line.startswith("†")]
    assert len(notes) == len({*notes}) >= 2  # once, though combinations have those of their language models
    assert not re.search(r"^sasrec †", text, flags=re.M)
    shutil.rmtree(run.path / "models" / "sft")
    assert "napo: sft, which napo was trained from, is gone" in table_text(run)


def test_other_data_is_refused_unless_asked_for(napo: Call, run: Run, small_world: Path, tmp_path: Path) -> None:
    source = ("prepare", "recbole", small_world / "files", "--out", tmp_path / "other", "--set", "min_user=2")
    assert napo(*source, "--set", "min_item=1", "--set", "test_users=20", "--set", "val_users=10", "--seed", 5)[0] == 0
    foreign = ["--data", tmp_path / "other", "--run", run.path]
    fails(napo("evaluate", *foreign, "--models", "sft"), "is not what .* was made with .*; pass --foreign-data")
    for command in ("sasrec", "sft", "train"):
        fails(napo(command, *foreign, "--overwrite"), "is other data .*; begin another run folder")
    asked = ("evaluate", *foreign, "--models", "sft", "--no-greedy", "--foreign-data")
    said = r"20 rows of test \(not the run's own, .*\) would replace figures of sft \(30 rows of test, 30 of them"
    fails(napo(*asked), said)
    code, out, _ = napo(*asked, "--overwrite")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("sft "))
    assert (
        row.startswith("sft †")
        and "Rows of different lists" in out
        and "judged on data that is not the run's own" in out
    )
    assert "lists" in out and any({"lists", "n"} <= set(line.split()) for line in table_text(run).splitlines())
    records = {record["model"]: record for record in read_json(run.path / "metrics.json")}
    assert records["sft"]["n"] == 20 and records["napo"]["n"] == 30
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")  # the same data under another name is the same
    assert napo("evaluate", "--data", tmp_path / "elsewhere", "--run", run.path, "--models", "popularity")[0] == 0


def test_recommending_needs_the_run_alone(napo: Call, run: Run) -> None:
    shutil.rmtree(run.path.parent / "data")
    title = pd.read_parquet(run.path / "items.parquet")["title"][0]
    assert napo("recommend", "--run", run.path, "--history", title, "--top", 2)[0] == 0
    assert not Path(run.config["data"]).is_absolute()


def test_a_tampered_stage_is_said(napo: Call, run: Run, small_world: Path) -> None:
    options = read_json(run.path / "stages" / "sft.json")["options"]["options"]
    sets = [f"--set={name}={json.dumps(value)}" for name, value in options.items()]
    again = ("sft", *common(run), "--model", small_world / "model", *sets)
    file = run.path / "models" / "sft" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
    fails(napo(*again), "was changed after it was finished; pass --overwrite")
    file.write_bytes(whole)
    for text in ("[]", "{}", '{"fingerprint": 3, "seconds": 1, "outputs": {}}', "null"):
        (run.path / "stages" / "sft.json").write_text(text)
        fails(napo(*again), r"sft\.json: not the stamp of a stage; delete it")
    (run.path / "stages" / "sft.json").unlink()
    fails(napo(*again), "is there, and no stage of this run made it")
    write_json(run.path / "models" / "sft" / "origin.json", {"model": "../../etc"})
    fails(napo("train", *common(run), "--overwrite"), r"origin\.json does not say how sft was made")


def test_titles_of_a_run_do_not_command_the_terminal(napo: Call, run: Run) -> None:
    items = pd.read_parquet(run.path / "items.parquet")
    items["title"] = [f"\x1b]0;owned\x07\x1b[2J\u202e{title}" for title in items["title"]]
    items.to_parquet(run.path / "items.parquet")
    tampered = napo("recommend", "--run", run.path, "--history", items["title"][0], "--model", "sasrec", "--top", 3)
    fails(tampered, r"items\.parquet is not what the run was made with")
    run.configure(kept_sha256={})
    missed = napo("recommend", "--run", run.path, "--history", "\x1b[2Jnone")
    fails(missed, r"items\.parquet: row 0: .*owned.* is no title of one line")
    for result in (tampered, missed):
        assert not {"\x1b", "\x07", "\u202e"} & set("".join(result[1:]))


def test_other_titles_than_those_of_the_training_are_refused(napo: Call, run: Run) -> None:
    """They would be named in place of the right ones."""
    items = pd.read_parquet(run.path / "items.parquet")
    title = items["title"][0]
    items["title"] = items["title"].to_list()[::-1]
    items.to_parquet(run.path / "items.parquet")
    recommended = napo("recommend", "--run", run.path, "--history", title, "--model", "sasrec")
    fails(recommended, r"items\.parquet is not what the run was made with")


def test_an_ascii_terminal_is_no_failure() -> None:
    code = "from napo import cli; cli.survive_narrow_encodings(); print('napo \u2020')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "napo \\u2020\n"), done.stderr
