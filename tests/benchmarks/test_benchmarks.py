"""The benchmarks run: every case and variant at tiny shapes on the CPU, into JSON, tables and plots."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = ("linear_sequence_logps", "sequence_logps", "napo_loss", "training_step", "evaluation")


@pytest.fixture(autouse=True)
def scripts_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(script: str, *arguments: str) -> None:
    old = sys.argv
    sys.argv = [script, *arguments]
    try:
        importlib.import_module(script).main()
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for script in SCRIPTS:
            run(f"bench_{script}", "--smoke", "--results", str(folder))
    return folder


def test_every_benchmark_reports_every_variant(measured: Path) -> None:
    (path,) = measured.glob("*.json")
    record = json.loads(path.read_text())
    assert set(record) == set(SCRIPTS)
    for name, benchmark in record.items():
        variants = {row["variant"] for row in benchmark["rows"]}
        assert {"napo"} < variants or name == "napo_loss", name
        failed = [row for row in benchmark["rows"] if "note" in row]
        assert not failed, failed
        assert all(row["median_ms"] > 0 for row in benchmark["rows"] if "ms_a_negative" not in row)
        assert benchmark["machine"]["torch"] == torch.__version__
    assert sum("ms_a_negative" in row for row in record["training_step"]["rows"]) == 1
    linear = record["linear_sequence_logps"]
    assert set(linear["machine"]["peers"]) >= {"cut_cross_entropy", "trl", "liger_kernel", "quack"}
    assert min(row["of_floor"] for row in linear["rows"] if row["variant"].startswith("floor")) == 1.0


def test_the_pieces_of_a_gpus_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts run; a kernel that fails is named, the rest is measured, and the program ends with an error."""
    micro, native = importlib.import_module("gpu_micro"), importlib.import_module("napo_kernels.native.softmax_rows")
    monkeypatch.setattr(native, "target_logits", lambda *_: 1 / 0)
    monkeypatch.setattr(micro, "Step", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match=r"target_logits: failed: Zero.*\ngpu_micro, widths, all: .*\ngpu_micro, step"):
        run("gpu_micro", "--device", "cpu", "--smoke", "--results", str(tmp_path))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run("gpu_micro", "--device", "cpu", "--smoke", "--results", str(tmp_path / "whole"))
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


def test_tables_and_plots(measured: Path, tmp_path: Path) -> None:
    run("render", "--results", str(measured), "--out", str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "No GPU benchmarks yet" in text and "Apple CCE" in text.replace("cut_cross_entropy", "Apple CCE")
    for name in re.findall(r"\]\((plots/.*?)\)", text):
        assert (tmp_path / name).stat().st_size > 10_000
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "plots").iterdir()} >= {"V.png", "pool.png", "P.png"}


def test_what_is_wrong_or_fails_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    harness = importlib.import_module("harness")
    report = harness.Report("op", argparse.Namespace(results=tmp_path))
    errors = {"peer": 1.0, "napo, other": 1.0}
    variants = {"napo": lambda: 1 / 0, "peer": time.time, "broken": lambda: 1 / 0}
    variants |= {"napo, other": harness.Variant(time.time, required=True), "naive": time.time}
    case = harness.compare(report, "c", variants, error=lambda name, _: errors.get(name, 0.0), tolerance=0.1)
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
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "device_answers", lambda: False)
    report = harness.Report("op", argparse.Namespace(results=tmp_path))
    with pytest.raises(SystemExit, match=r"op, c, peer: failed: ZeroDivisionError: .*error state"):
        harness.compare(report, "c", {"napo": time.time, "peer": lambda: 1 / 0, "later": time.time})
    (path,) = tmp_path.glob("*.json")
    rows = {row["variant"]: row for row in json.loads(path.read_text())["op"]["rows"]}
    assert "peak_mib" in rows["napo"] and "note" in rows["peer"] and "note" not in rows["later"]


def test_results_of_a_run_past_midnight_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, turns = importlib.import_module("harness"), importlib.import_module("turns")
    monkeypatch.setenv(turns.BY_TURNS, "2026-01-31T23:59:58+00:00")
    path = harness.Report("case", argparse.Namespace(results=tmp_path)).write()
    assert path.name.startswith("2026-01-31-")


def test_a_spent_budget_leaves_cases_out(tmp_path: Path) -> None:
    run("bench_napo_loss", "--smoke", "--budget", "0", "--results", str(tmp_path))
    (path,) = tmp_path.glob("*.json")
    benchmark = json.loads(path.read_text())["napo_loss"]
    assert benchmark["rows"] == [] and "B' 16, N 8" in benchmark["left_out"]


def test_memory_is_what_a_run_held_above_what_was_there() -> None:
    harness = importlib.import_module("harness")
    kept = torch.ones(50 << 20, dtype=torch.uint8)
    peak = harness.peak_memory(lambda: torch.ones(25 << 20).sum())  # 4 bytes each
    assert 95 << 20 < peak < 140 << 20
    assert kept.sum() == 50 << 20


def test_the_clock_measures_what_runs() -> None:
    harness = importlib.import_module("harness")
    timings = harness.interleave({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.001)}, repeats=3)
    assert timings["a"].best > 0.019 and timings["b"].best < timings["a"].best


def test_ratios_are_of_the_fastest_runs_of_all_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "SECONDS_OF_A_VARIANT", 0.2)  # what takes longer than .05 s is slow
    report = harness.Report("case", argparse.Namespace(results=tmp_path, smoke=True))
    report.put("before", [{"variant": "napo"}])
    spent = {"napo": iter([0.05, 0.05, 0.03, 0.002]), "slow": iter([0.4, 0.3, 0.05, 0.3, 0.02])}
    runs = {name: lambda times=times: time.sleep(next(times, 0.05)) for name, times in spent.items()}
    case = harness.compare(report, "c", runs)
    report.put("after", [{"variant": "napo"}])
    assert all("low_ms" not in row for row in report.rows)
    harness.sweep(report, [case])
    rows = {row["variant"]: row for row in report.rows if row["case"] == "c"}
    assert [row["case"] for row in report.rows] == ["before", "c", "c", "after"]
    assert rows["slow"]["runs"] == 2 and 20 <= rows["slow"]["best_ms"] < 40
    assert rows["napo"]["runs"] >= 2 and rows["napo"]["best_ms"] < 20
    slow, napo = rows["slow"], rows["napo"]
    assert slow["low_ms"] == pytest.approx((slow["best_ms"] + slow["median_ms"]) / 2, abs=2e-3)  # of two runs
    assert slow["times_napo"] == pytest.approx(slow["best_ms"] / napo["best_ms"], rel=1e-2)


def test_what_takes_long_takes_part_in_a_few_sweeps() -> None:
    harness = importlib.import_module("harness")
    case = harness.Comparison(harness.Report("case"), "c", dict.fromkeys(["quick", "slow", "slowest"], time.time))
    case.once = {"quick": 0.01, "slow": 2.0, "slowest": 60.0}
    sweeps = case.plan(0, 10)
    assert sweeps[0] == ["quick", "slow", "slowest"]  # nobody is left out where the time is over early
    count = {name: sum(name in names for names in sweeps) for name in case.once}
    assert count == {"quick": 10, "slow": harness.SECONDS_OF_A_VARIANT // 2, "slowest": 3}
    assert [number for number, names in enumerate(sweeps) if "slowest" in names] == [0, 4, 7]
    # A plan cut short still gives them their three turns.
    case.visits = {"quick": 3, "slow": 2, "slowest": 1}
    assert [names[1:] for names in case.plan(3, 6)] == [["slow", "slowest"], ["slowest"], ["slow"]]


def test_benchmarks_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(
            "import sys\n"
            f"sys.path.append({str(BENCHMARKS)!r})\n"
            "from turns import give_way\n"
            "for turn in range(3):\n"
            f"    print('begin {name}', turn, file=open({str(log)!r}, 'a'))\n"
            f"    print('end {name}', turn, file=open({str(log)!r}, 'a'))\n"
            "    give_way()\n"
            f"sys.exit({name == 'a':d})\n"
        )
    command = [sys.executable, str(BENCHMARKS / "by_turns.py"), str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a.py: exit status 1" in done.stderr and "b.py" not in done.stderr
    expected = [f"{what} {name} {turn}" for turn in range(3) for name in "ab" for what in ("begin", "end")]
    assert log.read_text().splitlines() == expected


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_name, ratios in (("one", (2.0, 10.0)), ("two", (2.1, 13.0))):
        rows = [{"case": "c", "variant": name, "best_ms": 7.0 * x} for name, x in zip("ab", ratios, strict=True)]
        (tmp_path / run_name).mkdir()
        (tmp_path / run_name / "day.json").write_text(
            json.dumps({"op": {"rows": [*rows, {"case": "c", "variant": "napo", "best_ms": 7.0}]}})
        )
    run("compare_runs", str(tmp_path / "one"), str(tmp_path / "two"))
    text = capsys.readouterr().out
    assert "| op | 1 of 2 | +30% (b; c) |" in text and "| c | b | 10 | 13 | +30% |" in text


def test_both_truths_of_the_loss_agree() -> None:
    bench = importlib.import_module("bench_napo_loss")
    p = bench.problem(24, 8, "negative margin")
    summed = bench.truth(p)
    p.arguments["exclude"] = torch.zeros(0, 3, dtype=torch.int64)  # from here on every list has all its negatives
    for short, full in zip(summed, bench.truth(p), strict=True):
        torch.testing.assert_close(short, full, rtol=1e-12, atol=0)
