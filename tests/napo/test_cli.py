"""The command line in this process where that is the same thing, as a process of its own where it is not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from command_calls import Call

from napo import cli, extras, signals
from napo.command_line.flags import own_parameters
from napo.command_line.parameters import RunFolder
from napo.data.sources import SOURCES
from napo.data.styles import STYLES
from napo.objectives import OBJECTIVES
from napo.program import call
from napo.signals import Stopped, saving_first

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = tuple(cli.COMMANDS)


def fails(result: tuple[int, str, str], code: int, pattern: str) -> None:
    """Exit ``code`` and one line that matches."""
    assert result[0] == code
    assert result[2].count("\n") == 1, result[2]
    assert re.search(pattern, result[2]), result[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(napo: Call, command: str) -> None:
    code, out, err = napo(command, "--help")
    assert code == 0 and err == ""
    assert f"Example: napo {command}" in " ".join(out.split())
    assert "None" not in out, "YAML and --set say null"


def test_errors_name_the_commands_that_make_runs(napo: Call, tmp_path: Path) -> None:
    makes = RunFolder.__metadata__[0].help  # type: ignore[attr-defined]
    makers = {
        name
        for name, command in cli.COMMANDS.items()
        for parameter in own_parameters(command).values()
        if makes in [getattr(of, "help", None) for of in getattr(parameter.annotation, "__metadata__", ())]
    }
    words = "expected the folder of a run, which napo (.*) makes"
    result = napo("report", tmp_path / "none", "--out", tmp_path / "r.html")
    fails(result, 1, words)
    found = re.search(words, result[2])
    assert found is not None and set(re.split(", | or ", found[1])) == {*makers, "run"}  # which takes it from its file


def test_help_is_quick() -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "napo.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - began < 4  # the import of torch takes longer than that on a busy machine
    loaded = "import sys, napo.cli; assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], check=True)


@pytest.mark.parametrize("command, names", [("prepare", SOURCES), ("train", OBJECTIVES), ("sft", STYLES)])
def test_help_shows_the_choices(napo: Call, command: str, names: Collection[str]) -> None:
    _, out, _ = napo(command, "--help")
    assert ", ".join(names) in " ".join(out.split())


def test_info(napo: Call) -> None:
    code, out, _ = napo("info")
    assert code == 0
    for word in (
        "torch",
        "threads",
        "cache",
        "extras",
        "variables",
        "built with",
        "cpu_isa",
        "reference",
        "cpu",
        "cuda",
    ):
        assert word in out


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_may_be_closed(demo_run: object, tmp_path: Path, closed: str) -> None:
    (tmp_path / "in.csv").write_text("user\n1\n")
    run = demo_run.path  # type: ignore[attr-defined]
    line = f"{sys.executable} -m napo.cli recommend --run {run} --model sasrec --input in.csv --out out.csv {closed}"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    assert (tmp_path / "out.csv").is_file()


def test_missing_packages_of_an_extra_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("gguf", "peft", "pandas") else object())
    with pytest.raises(ImportError, match=r"^gguf: not installed.* needs it; in the clone: pip install '\.\[demo\]'$"):
        extras.require("demo")
    remedy = r"needs them; in the clone: pip install '\.\[toolkit\]'$"
    with pytest.raises(ImportError, match=rf"^pandas, peft: not installed.* {remedy}"):
        extras.require("toolkit")
    extras.require("report")


def test_a_command_without_its_extra_says_what_to_do(napo: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "uvicorn" else object())
    code, _, err = napo("serve", "--run", "none", "--port", 0)
    assert (code, err) == (
        1,
        "napo: uvicorn: not installed, and this part of napo needs it; in the clone: pip install '.[serve]'\n",
    )


def test_without_the_toolkit_the_command_is_one_line() -> None:
    """-I -S: an environment without any package."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from napo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("napo: accelerate, ") and "in the clone: pip install '.[toolkit]'" in done.stderr


def test_info_shows_the_kernels_without_the_toolkit() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import napo.extras as extras; sys.argv = ['napo', 'info'];"
        "extras.find_spec = lambda name: None; from napo.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "'.[toolkit]'" in done.stderr, done
    assert "torch" in done.stdout and "reference" in done.stdout


def test_the_whole_way_by_commands(napo: Call, small_world: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    small = ["--set", "min_user=2", "--set", "min_item=1", "--set", "test_users=20", "--set", "val_users=10"]
    code, out, _ = napo("prepare", "recbole", small_world / "files", "--out", data, *small)
    assert code == 0 and "60 items" in out
    common = ["--data", data, "--run", run]
    inside = napo("sasrec", *common, "--set", "max_epochs=2", "--export", tmp_path / "run" / "sasrec")
    assert inside[0] == 2 and "export: " in inside[2] and "lies in the run" in inside[2]  # it would no more be its own
    assert napo("sasrec", *common, "--set", "max_epochs=2", "--export", tmp_path / "rows")[0] == 0
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == [
        f"{split}.safetensors" for split in ("test", "train", "val")
    ]
    fails(napo("train", *common), 1, f"no model yet; run `napo sft --data {data} --run {run}` first")
    options = ["--set", "examples=32", "--set", 'lora={"r": 4}']
    assert napo("sft", *common, "--model", small_world / "model", *options)[0] == 0
    code, out, _ = napo("sft", *common, "--model", small_world / "model", *options)
    assert code == 0 and "sft: finished before" in out
    few = ["--set", "users=16", "--set", "negatives=3"]
    assert napo("train", *common, "--objective", "sdpo", *few)[0] == 0
    code, out, _ = napo("evaluate", *common, "--models", "popularity,base,sdpo", "--limit", 10)
    assert code == 0 and "sdpo - base" in out
    code, out, _ = napo("recommend", "--run", run, "--history", "Blue Red", "--history", "Blue Silent", "--top", 3)
    assert code == 0 and len(out.splitlines()) == 3
    assert napo("report", run, "--out", tmp_path / "r.html")[0] == 0 and (tmp_path / "r.html").is_file()
    assert napo("report", "--run", run, "--out", tmp_path / "r2.html")[0] == 0 and (tmp_path / "r2.html").is_file()
    fails(napo("report", "--out", tmp_path / "r3.html"), 2, "expected a run folder")
    fails(napo("train", *common, "--init-from", "dpo", *few), 1, "has no model 'dpo'; it has sft, sdpo")
    fails(napo("evaluate", *common, "--models", "grok"), 1, "has no 'grok'; it has popularity")
    code, out, err = napo("recommend", "--run", run, "--history", "Blue Redd", "--user", 1)
    fails((code, out, err), 2, "expected one of --history, --user and --input")
    fails(napo("recommend", "--run", run, "--history", "Bleu"), 1, "expected a title or an id of the catalogue")
    code, out, err = napo("recommend", "--run", run, "--history", "Bleu", "--unknown", "skip", "--model", "sasrec")
    assert code == 0 and err.splitlines()[-2:] == ["1 item not known: 'Bleu'", "by popularity"], err
    code, out, err = napo("recommend", "--run", run, "--user", 1, "--json", "-k", 2)
    assert code == 0 and len(json.loads(out)["items"]) == 2 and err == ""
    users = tmp_path / "users.csv"
    users.write_text("user\n1\n2\n")
    code, out, _ = napo(
        "recommend", "--run", run, "--model", "sdpo", "--input", users, "--out", tmp_path / "recs.parquet"
    )
    assert code == 0 and out.endswith("recs.parquet: 2 rows: 2 by sdpo\n")


def test_wrong_usage_exits_2(napo: Call, tmp_path: Path) -> None:
    fails(napo("prepare", "netflix", tmp_path, "--out", tmp_path / "x"), 2, "expected one of .*movielens.*'netflix'")
    fails(napo("prepare", "recbole", tmp_path), 2, "--out")
    fails(napo("train", "--data", tmp_path, "--run", tmp_path, "--objective", "ppo"), 2, "napo train --help")
    fails(napo("bogus"), 2, "bogus")
    files = ("--input", tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    fails(napo("recommend", "--run", tmp_path, *files, "--json"), 2, r"--json prints one answer; .* \.jsonl")
    fails(napo("evaluate", "--data", tmp_path, "--run", tmp_path, "--limit", 0), 2, "limit")
    out = napo("prepare", "recbole", tmp_path, "--out", tmp_path / "x", "--set", "min_user")
    fails(out, 2, "expected NAME=VALUE")


def test_failures_exit_1_with_one_line(napo: Call, small_world: Path, demo_run: object, tmp_path: Path) -> None:
    fails(
        napo("prepare", "recbole", tmp_path / "none", "--out", tmp_path / "x"), 1, "no such file or folder; give PATH"
    )
    fails(napo("prepare", "recbole", small_world / "files", "--out", tmp_path / "x", "--set", "mean=1"), 1, "mean: no")
    share = ("prepare", "recbole", small_world / "files", "--out", tmp_path / "x", "--max-bad")
    fails(napo(*share, "lots"), 2, "--max-bad: expected a share like 1% or 0.01; got 'lots'")
    fails(napo(*share, "nan"), 2, "max_bad: expected a finite number, got nan")
    fails(napo(*share, "200%"), 2, "max_bad: expected a share between 0 and 1, got 2.0")
    fails(napo("sasrec", "--data", tmp_path / "none", "--run", tmp_path), 1, "napo prepare")
    data = demo_run.data  # type: ignore[attr-defined]
    fails(napo("evaluate", "--data", data, "--run", tmp_path / "none"), 1, "no config.json")
    fails(napo("report", tmp_path / "none", "--out", tmp_path / "r.html"), 1, "no config.json")
    fails(napo("sft", "--data", data, "--run", tmp_path / "run", "--model", "./none"), 1, "model: no such folder")
    options = ["--model", small_world / "model", "--set", "epoch=1"]
    fails(napo("sft", "--data", data, "--run", tmp_path / "run", *options), 2, "epoch: no such option; .*epochs")


def test_a_dtype_of_the_environment_is_no_matter_of_the_model(
    napo: Call, small_world: Path, demo_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAPO_DTYPE", "foo")
    data = demo_run.data  # type: ignore[attr-defined]
    said = napo("sft", "--data", data, "--run", tmp_path / "run", "--model", small_world / "model")
    fails(said, 1, r"^[^(]*NAPO_DTYPE: expected one of auto, bf16, fp16, fp32; got 'foo'")


def test_prepare_checks_a_tokenizer_and_keeps_the_data(napo: Call, small_world: Path, tmp_path: Path) -> None:
    from small_world import lossy_model

    lossy, out = lossy_model(tmp_path / "lossy"), tmp_path / "data"
    arguments = ("prepare", "recbole", small_world / "files", "--out", out, "--check-tokenizer")
    assert "tells all titles apart" in napo(*arguments, small_world / "model")[1]
    fails(napo(*arguments, lossy), 1, "tokenizer: expected tokens of its own for each of 60 titles, got 60")
    assert (out / "dataset.json").is_file()


def test_model_without_a_causal_head(napo: Call, small_world: Path, demo_run: object, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(small_world / "model").save_pretrained(tmp_path / "t5")
    data = demo_run.data  # type: ignore[attr-defined]
    result = napo("sft", "--data", data, "--run", tmp_path / "run", "--model", tmp_path / "t5")
    fails(result, 1, "has no causal language-model head .*; give a decoder model")


def test_folder_without_weights(napo: Call, demo_run: object, small_world: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((small_world / "model" / name).read_bytes())
    data = demo_run.data  # type: ignore[attr-defined]
    result = napo("sft", "--data", data, "--run", tmp_path / "run", "--model", tmp_path / "model")
    fails(result, 1, "model: cannot load .*model .*; give smollm2-135m, a folder that holds a saved model")


def test_no_network_and_an_empty_cache(napo: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, _, err = napo("demo", "--run", tmp_path / "run")
    assert code == 1
    assert "check that pip reaches a package index" in err.splitlines()[-1]


def test_debug_shows_the_traceback(napo: Call, tmp_path: Path) -> None:
    code, _, err = napo("report", tmp_path / "none", "--out", tmp_path / "r.html", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("napo: run:")


def test_what_is_not_ours_says_where_to_look(napo: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("position\nmore")

    monkeypatch.setattr("napo.evaluation.report.report", broken)
    (tmp_path / "config.json").write_text('{"format": 2}')
    fails(napo("report", tmp_path, "--out", tmp_path / "r.html"), 1, "KeyError: .*--debug shows where")


def test_the_choices_for_unknown_items_are_the_recommenders() -> None:
    from typing import get_args

    from napo.command_line.parameters import UnknownItems
    from napo.recommend import Unknown

    assert tuple(one.value for one in UnknownItems) == get_args(Unknown)


def test_what_is_written_whole_or_not_at_all_begins_again(
    napo: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: object) -> None:
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr("napo.data.prepare.prepare", stopped)
    monkeypatch.setattr("napo.data.downloads.download", lambda *given, **options: None)
    code, _, err = napo("prepare", "csv", tmp_path, "--out", tmp_path / "out")
    again = r"to begin again: (napo|\S+ -m napo) prepare"
    assert code == 130 and re.search(rf"stopped; nothing is kept; {again} csv", err)
    code, _, err = napo("prepare", "movielens", tmp_path, "--out", tmp_path / "out", "--download", "ml-1m")
    assert code == 130 and re.search(rf"stopped; nothing but a finished download is kept; {again}", err)


def test_a_training_that_was_not_waited_for_does_not_reassure(
    napo: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*given: object, **options: object) -> None:
        with saving_first():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signals, "_asked", None)
    monkeypatch.setattr("napo.demo.demo", work)
    code, _, err = napo("demo", "--run", tmp_path)
    assert code == 130 and "is kept" not in err
    assert "napo: stopped without saving; what was done since the last checkpoint is lost; to continue: " in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_one_line(number: int, tmp_path: Path) -> None:
    """It was the traceback of a KeyboardInterrupt in whatever was being imported."""
    (tmp_path / "typer.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nimport time\ntime.sleep(30)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from napo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + number
    assert re.fullmatch(r"napo: stopped before it began; to begin again: (napo|\S+ -m napo) info\n", done.stderr)


def test_a_command_that_the_shell_does_not_find_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After ``make demo``, whose program lies in .venv, "to continue: napo demo" was not to be found."""
    for folder in ("bin", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "napo").write_text("")
        (tmp_path / folder / "napo").chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "napo"), "demo"])
    for path, program in (("nowhere", sys.argv[0]), ("other", sys.argv[0]), ("bin", "napo")):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert call(["demo", "--run", "a b"]) == f"{program} demo --run 'a b'"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "napo" / "__main__.py"), "demo"])
    assert call(["info"]) == "napo info"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert call(["info"]) == f"{sys.executable} -m napo info"
