"""The study of LastFM with the tiny model: every piece runs, is skipped when it is there, and ends in results.json."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from napo.evaluation import metrics
from napo.files import read_json, write_json
from napo.options import made
from napo.runs import checked_model_name

ROOT = Path(__file__).parents[2]
TINY = {"window": 6, "min_history": 1, "prefixes": True, "batch_size": 3, "negatives": 2, "negatives_from": "sasrec"}


@pytest.fixture(scope="module")
def lastfm() -> Any:
    """The study's own modules."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield importlib.import_module("studies.lastfm.study")
    patch.undo()


def tiny_study(lastfm: Any, out: Path, world: Path, names: str) -> Any:
    config = importlib.import_module("studies.lastfm.config")
    size = config.Size(
        budget=1500,
        trial=400,
        val_lists=8,
        test_lists=10,
        catalogue_rows=6,
        inside_batches=1,
        protocol_a=True,
        model=str(world / "model"),
        sasrec={"max_epochs": 1, "dim": 8},
        sft={
            "window": 10,
            "history": 10,
            "val_examples": 4,
            "val_lists": 4,
            "evaluations": 1,
            "lora": {"top_layers": 1},
        },
        preferences={**TINY, "sft_weight": 0.5, "count_negatives": True, "learning_rate": 1e-3},
    )
    return lastfm.Study(out=out, dataset="ml-100k", size=size, trials=config.selected(names), files=world / "files")


def test_all_pieces_run_and_are_skipped_then(
    lastfm: Any, small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = {"test_users": 20, "val_users": 10, "min_user": 2, "min_item": 1}
    monkeypatch.setitem(lastfm.DATASETS, "ml-100k", replace(lastfm.DATASETS["ml-100k"], prepare=prepare))
    repeats = "napo-seed1,sdpo-seed1,sft-longer-seed1"
    study = tiny_study(lastfm, tmp_path, small_world, f"napo,sdpo,{repeats},napo-random")
    assert study.go([0]) == []
    results = read_json(tmp_path / "results.json")
    found = results["seeds"]["0"]
    models = {"popularity", "itemknn", "rules", "sasrec", "sft", "sft-longer", "napo", "sdpo", "napo-random"}
    models |= {*repeats.split(","), "sft-candidates"}
    assert set(found["validation"]["models"]) == models
    assert set(found["test"]["models"]) >= (models - {"napo-random"}) | {
        "sft+sasrec",
        "napo+sasrec",
        "sasrec+rules",
    }
    for name in ("sft-longer", "napo", "sdpo", "napo-random", *repeats.split(",")):
        made = found["models"][name]
        assert 400 <= made["tokens"] < 900 and made["seconds"] > 0 and made["killed"] == 0 and made["peak_mib"] > 50
    assert {(pair["model"], pair["other"]) for pair in found["validation"]["differences"]} >= {
        ("napo", "sft"),
        ("napo", "sdpo"),
        ("napo-random", "sft-longer"),
    }
    ways = found["inside"]["false_negatives"]
    assert len(ways) == 6 and all(way["borrowed"] > 0 and 0 < way["false_share"] < 1 for way in ways)
    for record in found["inside"]["gradients-napo"]:
        assert record["norm_chosen"] > 0 and record["norm_own"] > 0 and record["norm_borrowed"] > 0
        assert record["mass_chosen"] == pytest.approx(record["mass_own"] + record["mass_borrowed"], rel=1e-4)
    assert found["catalogue"]["records"]
    plots = importlib.import_module("studies.lastfm.plots")
    assert len(plots.draw(tmp_path / "results.json", tmp_path / "plots")) == 5
    check_tables(results)
    check_contrasts(results, tmp_path / "seed-0")
    check_protocol_a(results, tmp_path / "seed-0")

    before = (tmp_path / "results.json").read_bytes()
    capsys.readouterr()
    assert study.go([0]) == []
    said = capsys.readouterr().out
    assert "sft: finished before" in said and "evaluate-napo@validation: finished before" in said
    assert not [line for line in said.splitlines() if line.endswith(" s") and "finished before" not in line]
    assert (tmp_path / "results.json").read_bytes() == before


def check_tables(results: dict[str, Any]) -> None:
    """A row a model with the mean of its trainings, and the contrasts, for both splits."""
    shown = importlib.import_module("studies.lastfm.tables").tables(results).split("\n\n")
    assert [table.split(" |")[0] for table in shown] == [
        "| validation lists",
        "| difference, validation lists",
        "| test lists",
        "| difference, test lists",
    ]
    rows = {row.split(" | ")[0]: row.split(" | ") for row in shown[2].splitlines()}
    judged = results["seeds"]["0"]["test"]["models"]
    hits = [judged[name]["hr@1"] for name in ("napo", "napo-seed1")]
    mean = f"{sum(hits) / 2:.3f}".replace("0.", ".", 1)
    assert rows["| `napo`"][1] == "2" and rows["| `napo`"][5] == mean and rows["| `napo`"][2].startswith(("4", "5"))
    assert len(rows) == 2 + len({name.removesuffix("-seed1") for name in judged})
    assert len(shown[3].splitlines()) == 2 + len(results["contrasts"]["test"])


def check_contrasts(results: dict[str, Any], run: Path) -> None:
    """Hits are averaged over the repeats first; what a run has once stands beside each of them."""
    assert results["seeds"]["0"]["models"]["napo-seed1"]["seed"] == 1
    origins = [read_json(run / "models" / name / "origin.json") for name in ("napo", "napo-seed1")]
    assert origins[0]["parent_sha256"] == origins[1]["parent_sha256"] and origins[0]["options"] == origins[1]["options"]
    for split, place in (("validation", run / "validation"), ("test", run)):
        frames = {path.stem: pd.read_parquet(path) for path in (place / "predictions").glob("*.parquet")}
        hits = {name: (frame["rank"] == 1).to_numpy(float) for name, frame in frames.items()}
        found = {record["name"]: record for record in results["contrasts"][split]}
        combined = {"SASRec with SFT - SASRec", "SASRec with SFT - without"} if split == "test" else set()
        assert set(found) == {"NAPO - SFT", "NAPO - SFT continued", "NAPO - S-DPO"} | combined
        mean = (hits["napo"] + hits["napo-seed1"]) / 2
        others = {
            "NAPO - SFT": hits["sft"],
            "NAPO - SFT continued": (hits["sft-longer"] + hits["sft-longer-seed1"]) / 2,
            "NAPO - S-DPO": (hits["sdpo"] + hits["sdpo-seed1"]) / 2,
        }
        for name, other in others.items():
            difference, users = mean - other, frames["sft"]["user"].to_numpy()
            assert found[name]["seeds"] == len(found[name]["hr@1"]["each"]) == 2
            assert found[name]["hr@1"]["difference"] == pytest.approx(difference.mean())
            assert found[name]["hr@1"]["ci"] == pytest.approx(metrics.interval(difference, users))
        several = {record["model"]: record for record in results["over_seeds"][split]}
        assert set(several) == {"napo", "sdpo", "sft-longer"}
        assert several["napo"]["hr@1_mean"] == pytest.approx(mean.mean())


def check_protocol_a(results: dict[str, Any], run: Path) -> None:
    """The budget in rows with the candidates in the prompt, judged by what greedy answers name."""
    made = results["seeds"]["0"]["models"]["sft-candidates"]
    assert read_json(run / "models" / "sft-candidates" / "origin.json")["style"] == "candidates"
    assert made["options"]["examples"] > 1 and 1500 <= made["tokens"] < 1800 and made["seconds"] > 0
    for split, lists in (("validation", 8), ("test", 10)):
        models = results["seeds"]["0"][split]["models"]
        found = models["sft-candidates"]
        assert found["n_greedy"] == found["n"] == lists and 0 <= found["hr@1_greedy"] <= found["valid_ratio"] <= 1
        low, high = found["hr@1_greedy_ci"]
        assert low <= found["hr@1_greedy"] <= high
        assert models["sft"]["hr@1_greedy"] is None


def test_pieces_that_have_no_time_are_left(lastfm: Any, small_world: Path, tmp_path: Path) -> None:
    study = tiny_study(lastfm, tmp_path, small_world, "napo")
    left = study.go([0, 1], lambda: False)
    assert left.index("seed 0: test") < left.index("seed 0: sft-candidates") < left.index("seed 0: catalogue")
    assert left[0] == "prepare" and left[1] == "seed 0: sasrec" and "seed 1: napo" in left
    assert left.index("seed 0: test") < left.index("seed 1: sasrec")


def test_repeats_of_one_seed_come_before_those_of_the_next_and_before_test_lists(lastfm: Any, tmp_path: Path) -> None:
    config = importlib.import_module("studies.lastfm.config")
    study = lastfm.Study(out=tmp_path, dataset="lastfm", size=config.Size(), trials=config.TRIALS, files=tmp_path)
    left = study.go([0, 1], lambda: False)
    main = [config.CONTROL, *(trial.name for trial in config.MAIN)]
    trained = [name.removeprefix("seed 0: ") for name in left if name.startswith("seed 0") and "-seed" in name]
    trained = [name for name in trained if not name.startswith("judge")]
    assert trained == [f"{name}-seed{seed}" for seed in (1, 2) for name in main]
    assert "seed 0: sft-candidates" not in left  # protocol A is asked for
    assert left.index("seed 0: napo-authors") < left.index("seed 0: sft-longer-seed1")
    assert left.index("seed 0: napo-authors-seed2") < left.index("seed 0: test") < left.index("seed 0: dmpo")
    assert "seed 1: napo-seed2" in left and "seed 1: napo-seed1" not in left  # which its main part is
    for name in trained:
        checked_model_name(name)


def test_a_killed_call_is_counted_as_one_whose_time_is_not_known(lastfm: Any, tmp_path: Path) -> None:
    measured, run = importlib.import_module("studies.lastfm.measured"), lastfm.Run(tmp_path)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom napo.runs import Run\n"
        "from studies.lastfm.measured import measured\n"
        "with measured(Run(Path(sys.argv[1])), 'work'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    run = lastfm.Run(tmp_path)  # a run that can be gone on with
    with measured.measured(run, "work"):
        run.stage("work", lambda aside: write_json(aside / "x.json", 1), inputs={}, outputs=["x.json"])
        time.sleep(0.05)
    assert measured.summary(run, "work")["killed"] == 1 and measured.summary(run, "work")["seconds"] >= 0.05
    with measured.measured(run, "work"):
        pass
    assert len(measured.calls_of(run, "work")) == 2  # there was nothing to do


def test_trials_are_told_by_name(lastfm: Any) -> None:
    config = importlib.import_module("studies.lastfm.config")
    names = [trial.name for trial in config.TRIALS]
    assert len(set(names)) == len(names) and names[0] == "napo"
    with pytest.raises(ValueError, match=r"trials: no trial 'dpos'; expected some of napo, simpo"):
        config.selected("napo,dpos")
    options = importlib.import_module("napo.finetuning.options")
    for trial in config.TRIALS:  # every trial is one that the package knows
        made(options.PreferenceOptions, config.Size().preference_options(trial))


def test_options_of_a_stage_come_as_names_and_values(
    lastfm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module("studies.lastfm.__main__")
    given = ["study", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "0"]

    def go(*more: str) -> Any:
        monkeypatch.setattr("sys.argv", [*given, *more])
        return command.main()

    seen = []
    monkeypatch.setattr(command, "draw", lambda *_: None)
    monkeypatch.setattr(command, "Study", lambda **parts: seen.append(parts["size"]) or lastfm.Study(**parts))
    go("--sft", "lora.r=64", "--sft", "learning_rate=1e-3", "--preferences", "sft_weight=0")
    assert seen[0].sft_options()["lora.r"] == 64 and seen[0].sft_options()["learning_rate"] == 1e-3
    assert seen[0].sft["patience"] == 3 and seen[0].preferences["sft_weight"] == 0
    with pytest.raises(ValueError, match=r"--sft: expected NAME=VALUE; got .lora\.r."):
        go("--sft", "lora.r")
    with pytest.raises(SystemExit):
        go("--preferences", "tokens=1000")
    assert "--preferences tokens: is what --trial says; use --trial" in capsys.readouterr().err
    with pytest.raises(ValueError, match="negative: no such option"):
        go("--preferences", "negative=4")
    assert not (tmp_path / "out").exists()  # said before anything is trained
