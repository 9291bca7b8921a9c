"""The benchmarks run: every case and variant at tiny shapes on the CPU, into JSON, tables and plots."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import BENCHMARKS, comparison, device, napo_loss, timing
from benchmarks.__main__ import main
from benchmarks.report import Report
from napo_kernels.dispatch import compiled

ROOT = Path(__file__).parents[2]
# Not here: `prepare`, `lists` and `serve`, which are timed as a whole, and `micro`, which has a test of its own.
NATIVE = "napo_kernels.native.linear_sequence_logps"
COMPARED = ("head", "catalogue", "rows", "loss", "step", "sharing", "evaluation")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for name in COMPARED:
        main(["run", name, "--smoke", "--results", str(folder)])
    return folder


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    for module, _ in BENCHMARKS.values():
        assert callable(importlib.import_module(f"benchmarks.{module}").main)


def test_run_alone_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    assert "run loss --help has its options" in capsys.readouterr().out


@pytest.mark.parametrize("rest", [[], ["nothing"]])
def test_an_unknown_benchmark_is_named(rest: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", *rest])
    assert re.search(r"run: expected one of head, catalogue, rows, .*, got nothing$", capsys.readouterr().err.strip())


def test_every_benchmark_reports_every_variant(measured: Path) -> None:
    (path,) = measured.glob("*.json")
    record = json.loads(path.read_text())
    assert set(record) == {BENCHMARKS[name][0] for name in COMPARED}
    for name, benchmark in record.items():
        variants = {row["variant"] for row in benchmark["rows"]}
        assert {"napo"} < variants or name == "napo_loss", name
        failed = [row for row in benchmark["rows"] if "note" in row]
        assert not failed, failed
        assert all(row["median_ms"] > 0 for row in benchmark["rows"] if "ms_a_negative" not in row)
        assert benchmark["machine"]["torch"] == torch.__version__
    assert sum("ms_a_negative" in row for row in record["training_step"]["rows"]) == 1
    shared = [row for row in record["sharing"]["rows"] if row["variant"] == "napo"]
    assert len(shared) == 2 and all(row["of_alone"] > 0 and row["tokens"] > 0 for row in shared)
    linear = record["linear_sequence_logps"]
    assert set(linear["machine"]["peers"]) >= {"cut_cross_entropy", "trl", "liger_kernel", "quack"}
    assert min(row["of_floor"] for row in linear["rows"] if row["variant"].startswith("floor")) == 1.0


def test_prepare_is_measured_beside_its_floor(tmp_path: Path) -> None:
    main(["run", "prepare", "--smoke", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    floor, ours = json.loads(path.read_text())["prepare"]["rows"]
    assert "(floor)" in floor["variant"] and ours["variant"] == "napo prepare"
    assert ours["rows"] > 0 and ours["peak_mib"] > 50


def test_lists_are_ranked_packed_and_alone(tmp_path: Path, tiny_shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAPO_DTYPE", "fp32")
    options = ["--data", str(tiny_shop / "data"), "--model", str(tiny_shop / "model"), "--limit", "3", "--alone", "2"]
    main(["run", "lists", *options, "--smoke", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = {row["variant"]: row for row in json.loads(path.read_text())["lists"]["rows"]}
    assert [rows[name]["lists"] for name in ("alone", "packed", "catalogue")] == [2, 3, 3]
    assert all(row["lists_per_s"] > 0 for row in rows.values())


def test_the_service_is_measured_under_clients(tmp_path: Path, tiny_shop: Path) -> None:
    pytest.importorskip("fastapi")
    options = ["--run", str(tiny_shop / "run"), "--clients", "4", "--seconds", "1", "--threads", "1"]
    main(["run", "serve", *options, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    one, many = json.loads(path.read_text())["serve"]["rows"]
    assert one["variant"] == "1 client" and many["variant"] == "4 clients"
    for row in (one, many):
        assert row["answers"] > 0 and row["errors"] == 0 and row["compared"] > 0 and row["different"] == 0


@pytest.fixture(scope="module")
def tiny_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/``, ``data/`` and ``run/`` with only SASRec."""
    from napo.data.prepare import prepare, split_options
    from napo.runs import Run
    from napo.stages import sasrec_stage

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "napo"))
    try:
        import small_world
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("shop")
    small_world.model(folder / "model")
    small_world.recbole_files(folder / "files")
    small = {"min_user": 2, "min_item": 1, "test_users": 10, "val_users": 10}
    data = prepare("recbole", folder / "files", folder / "data", *split_options(small))
    sasrec_stage(Run(folder / "run"), data, seed=0, options={"max_epochs": 1, "dim": 16})
    return folder


def test_the_pieces_of_a_gpus_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts run; a kernel that fails is named, the rest is measured, and the program ends with an error."""
    step, native = (importlib.import_module(name) for name in ("benchmarks.training_step", NATIVE))
    monkeypatch.setattr(native, "target_logits", lambda *_: 1 / 0)
    monkeypatch.setattr(step, "Step", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match=r"target_logits: failed: Zero.*\ngpu_micro, widths, all: .*\ngpu_micro, step"):
        main(["run", "micro", "--smoke", "--results", str(tmp_path)])
    monkeypatch.undo()
    main(["run", "micro", "--smoke", "--results", str(tmp_path / "whole")])
    rows = {}
    for folder in (tmp_path, tmp_path / "whole"):
        (path,) = folder.glob("*.json")
        rows[folder.name] = {
            (row["case"], row["variant"]): row for row in json.loads(path.read_text())["gpu_micro"]["rows"]
        }
    whole, damaged = rows["whole"], rows[tmp_path.name]
    assert all(row["best_ms"] > 0 for row in whole.values())
    assert {case.partition(",")[0] for case, _ in whole} >= {"roofline", "two matmuls", "row kernels", "step"}
    lost = {key for key in whole if "best_ms" not in damaged.get(key, {})}
    assert {variant for case, variant in lost if case.startswith("row kernels")} == {"cpu: target_logits"}


def test_parts_without_a_model_start_without_transformers() -> None:
    """Its import took longer than what `builds` measures in each of its processes."""
    code = "import sys, benchmarks.gpu_trials; print(*{'transformers', 'peft', 'napo.scoring'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("asked", "loads"), [("1", False), ("1", True), ("", False)])
def test_where_minutes_are_counted_no_module_is_built(asked: str, loads: bool, tmp_path: Path) -> None:
    """A module that cannot run ends the call in one line; without GPU_NO_BUILD=1 it would be built."""
    python, cmake = tmp_path / "python", tmp_path / "cmake"
    answers = [f'*sys.executable*) echo "{python}" ;;', f"*why_not*) {'' if loads else 'echo stale >&2; exit 1'} ;;"]
    python.write_text("\n".join(["#!/bin/sh", 'case "$2" in', *answers, "esac"]))
    cmake.write_text("#!/bin/sh\necho building >&2; exit 1")
    for program in (python, cmake):
        program.chmod(0o755)
    command = ["make", "gpu-module", f"GPU_PYTHON={python}", f"GPU_RESULTS={tmp_path}/results", f"GPU_NO_BUILD={asked}"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert ("building" in said) == (not asked)
    if asked:
        assert (done.returncode == 0) == loads and said == ([] if loads else ["stale"])


def test_trials_run_and_one_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("benchmarks.gpu_step_trials")
    monkeypatch.setattr(step, "pefts_switch", lambda: 1 / 0)
    arguments = ["trials", "--device", "cpu", "--smoke", "--results", str(tmp_path), "--parts"]
    with pytest.raises(SystemExit, match=r"^gpu_trials, layers: .*, PEFT's disable_adapter: failed: Zero[^\n]*$"):
        main([*arguments, "head", "odd", "host", "layers", "attention", "lengths"])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["gpu_trials"]["rows"]
    assert [row["variant"] for row in rows if "best_ms" not in row] == ["napo + reference, PEFT's disable_adapter"]
    kinds = {re.split("[,:]", row["case"])[0] for row in rows}
    assert kinds == {"head", "roofline", "row kernels", "host", "layers", "attention", "a new row length"}
    steps = [row for row in rows if "logps_differ" in row]
    assert {row["case"].partition(":")[0] for row in steps} == {"layers", "attention"}
    assert all(row["logps_differ"] < 0.02 and row["gradients_differ"] < 0.05 for row in steps)  # bf16


def test_trials_of_other_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = compiled()
    assert module is not None
    (tmp_path / "builds" / "same").mkdir(parents=True)
    shutil.copy(module.__file__, tmp_path / "builds" / "same")
    shutil.copy(module.__file__, tmp_path / "builds" / "same" / "_C.cpython-39-x86_64-linux-gnu.so")
    arguments = ["trials", "--device", "cpu", "--smoke", "--parts", "builds", "--results", str(tmp_path)]
    main([*arguments, "--builds", str(tmp_path / "builds")])
    (path,) = tmp_path.glob("*.json")
    variants = [row["variant"] for row in json.loads(path.read_text())["gpu_trials"]["rows"]]
    kernels = {name: [v.partition(", ")[2] for v in variants if v.startswith(name)] for name in ("default", "same")}
    assert kernels["default"] == kernels["same"] and len(variants) == 2 * len(kernels["same"])
    assert "builds: 1 of 2 modules are for another Python, not tried" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--builds: expected NAME/_C"):
        main([*arguments, "--builds", str(tmp_path / "nothing")])


def test_tables_and_plots(measured: Path, tmp_path: Path) -> None:
    main(["render", "--results", str(measured), "--out", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "No GPU benchmarks yet" in text and "Apple CCE" in text.replace("cut_cross_entropy", "Apple CCE")
    for name in re.findall(r"\]\((plots/.*?)\)", text):
        assert (tmp_path / name).stat().st_size > 10_000
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "plots").iterdir()} >= {"V.png", "pool.png", "P.png"}


def test_what_is_wrong_or_fails_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    report = Report("op", argparse.Namespace(results=tmp_path))
    errors = {"peer": 1.0, "napo, other": 1.0}
    variants = {"napo": lambda: 1 / 0, "peer": time.time, "broken": lambda: 1 / 0}
    variants |= {"napo, other": timing.Variant(time.time, required=True), "naive": time.time}
    case = comparison.compare(report, "c", variants, error=lambda name, _: errors.get(name, 0.0), tolerance=0.1)
    case.measure(list(case.once), repeats=2)
    rows = {row["variant"]: row for row in report.rows}
    assert [name for name, row in rows.items() if "median_ms" in row] == ["naive"]
    assert "ZeroDivisionError" in rows["napo"]["note"] and "ZeroDivisionError" in rows["broken"]["note"]
    assert "wrong by 1" in rows["peer"]["note"] and "wrong by 1" in rows["napo, other"]["note"]
    with pytest.raises(SystemExit, match=r"op, c, napo: failed: .*\nop, c, napo, other: wrong by 1, allowed 0.1"):
        report.finish()
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["op"]["failed"]) == 2  # peers are not among them


def test_a_device_in_an_error_state_ends_the_program_after_what_is_known_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "answers", lambda: False)
    report = Report("op", argparse.Namespace(results=tmp_path))
    with pytest.raises(SystemExit, match=r"op, c, peer: failed: ZeroDivisionError: .*error state"):
        comparison.compare(report, "c", {"napo": time.time, "peer": lambda: 1 / 0, "later": time.time})
    (path,) = tmp_path.glob("*.json")
    rows = {row["variant"]: row for row in json.loads(path.read_text())["op"]["rows"]}
    assert "peak_mib" in rows["napo"] and "note" in rows["peer"] and "note" not in rows["later"]


def test_benchmarks_of_one_run_write_into_one_file(tmp_path: Path) -> None:
    for name in ("one", "other"):
        path = Report(name, argparse.Namespace(results=tmp_path, day="2026-01-31")).write()
        assert path.name.startswith("2026-01-31-")
    assert set(json.loads(path.read_text())) == {"one", "other"}


def test_a_spent_budget_leaves_cases_out(tmp_path: Path) -> None:
    main(["run", "loss", "--smoke", "--budget", "0", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    benchmark = json.loads(path.read_text())["napo_loss"]
    assert benchmark["rows"] == [] and "B' 16, N 8" in benchmark["left_out"]


def test_memory_is_what_a_run_held_above_what_was_there() -> None:
    kept = torch.ones(50 << 20, dtype=torch.uint8)
    peak = timing.peak_memory(lambda: torch.ones(25 << 20).sum())  # 4 bytes each
    assert 95 << 20 < peak < 140 << 20
    assert kept.sum() == 50 << 20


def test_the_clock_measures_what_runs() -> None:
    timings = timing.interleave({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.001)}, repeats=3)
    assert timings["a"].best > 0.019 and timings["b"].best < timings["a"].best


def test_ratios_are_of_the_fastest_runs_of_all_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "SECONDS_OF_A_VARIANT", 0.2)  # what takes longer than .05 s is slow
    report = Report("case", argparse.Namespace(results=tmp_path, smoke=True))
    report.put("before", [{"variant": "napo"}])
    spent = {"napo": iter([0.05, 0.05, 0.03, 0.002]), "slow": iter([0.4, 0.3, 0.05, 0.3, 0.02])}
    runs = {name: lambda times=times: time.sleep(next(times, 0.05)) for name, times in spent.items()}
    case = comparison.compare(report, "c", runs)
    report.put("after", [{"variant": "napo"}])
    assert all("low_ms" not in row for row in report.rows)
    comparison.sweep(report, [case])
    rows = {row["variant"]: row for row in report.rows if row["case"] == "c"}
    assert [row["case"] for row in report.rows] == ["before", "c", "c", "after"]
    assert rows["slow"]["runs"] == 2 and 20 <= rows["slow"]["best_ms"] < 40
    assert rows["napo"]["runs"] >= 2 and rows["napo"]["best_ms"] < 20
    slow, napo = rows["slow"], rows["napo"]
    assert slow["low_ms"] == pytest.approx((slow["best_ms"] + slow["median_ms"]) / 2, abs=2e-3)  # of two runs
    assert slow["times_napo"] == pytest.approx(slow["best_ms"] / napo["best_ms"], rel=1e-2)


def test_what_takes_long_takes_part_in_a_few_sweeps() -> None:
    case = comparison.Comparison(Report("case"), "c", dict.fromkeys(["quick", "slow", "slowest"], time.time))
    case.once = {"quick": 0.01, "slow": 2.0, "slowest": 60.0}
    turns = []
    while due := case.due():
        turns.append(due)
        for name in due:
            case.visits[name] += 1
    assert [sum(name in names for names in turns) for name in case.once] == [800, 4, 3]
    assert turns[0] == ["quick", "slow", "slowest"]  # nobody is left out where the time is over early


def test_a_sweep_leaves_out_what_the_budget_does_not_cover() -> None:
    case = comparison.Comparison(Report("case"), "c", dict.fromkeys(["quick", "slow", "slowest"], time.time))
    case.once = {"quick": 0.01, "slow": 2.0, "slowest": 60.0}
    visit = comparison.SECONDS_OF_A_VISIT
    assert comparison.affordable([case], visit + 62.02) == 60.0
    assert comparison.affordable([case], visit + 62.0) == 2.0
    assert comparison.affordable([case], visit + 0.02) == 0.01
    assert comparison.affordable([case], visit) == 0.0


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_name, ratios in (("one", (2.0, 10.0)), ("two", (2.1, 13.0))):
        rows = [{"case": "c", "variant": name, "best_ms": 7.0 * x} for name, x in zip("ab", ratios, strict=True)]
        (tmp_path / run_name).mkdir()
        (tmp_path / run_name / "day.json").write_text(
            json.dumps({"op": {"rows": [*rows, {"case": "c", "variant": "napo", "best_ms": 7.0}]}})
        )
    main(["compare", str(tmp_path / "one"), str(tmp_path / "two")])
    text = capsys.readouterr().out
    assert "| op | 1 of 2 | +30% (b; c) |" in text and "| c | b | 10 | 13 | +30% |" in text


def test_both_truths_of_the_loss_agree() -> None:
    p = napo_loss.problem(24, 8, "negative margin")
    summed = napo_loss.truth(p)
    p.arguments["exclude"] = torch.zeros(0, 3, dtype=torch.int64)  # from here on every list has all its negatives
    for short, full in zip(summed, napo_loss.truth(p), strict=True):
        torch.testing.assert_close(short, full, rtol=1e-12, atol=0)
