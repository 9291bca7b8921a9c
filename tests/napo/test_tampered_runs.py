"""Files of a run that were changed, damaged or taken from another run: one line that names the file, and no figure."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_calls import Call
from run_hashes import without_hashes
from safetensors.torch import load_file, save_file
from tampering import changed_json, changed_table, refused

from napo.evaluation.report import table_text
from napo.files import content_hash, read_json, write_json
from napo.recommend import Recommender, best_model
from napo.recommenders.options import SASRecOptions
from napo.recommenders.registry import find
from napo.recommenders.sasrec import SASRec
from napo.runs import Run


@pytest.fixture
def run(demo_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(demo_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.mark.parametrize("name", ["popularity", "sequences", "interactions", "users"])
def test_what_a_run_keeps_is_what_it_was_made_with(napo: Call, run: Run, name: str) -> None:
    changed_table(run.path / f"{name}.parquet", lambda frame: frame.iloc[::-1])
    refused(
        napo, run, rf"{name}\.parquet is not what the run was made with \(expected sha256 \w+ as .*, got \w+\); run"
    )


@pytest.mark.parametrize(
    "name, change, pattern",
    [
        ("popularity", lambda f: f.iloc[::-1], "expected counts of 60 items in their order"),
        ("popularity", lambda f: f.iloc[1:], "expected counts of 60 items in their order; got 59"),
        ("popularity", lambda f: f.astype({"interactions": float}), "of other kinds"),
        ("popularity", lambda f: f.drop(columns="interactions"), "cannot be read"),
        (
            "sequences",
            lambda f: f.iloc[::-1],
            "expected sequences of items from 0 to 59, one after the other; got others",
        ),
        ("sequences", lambda f: f.assign(item_id=60), "expected sequences of items from 0 to 59"),
        ("sequences", lambda f: f.astype({"item_id": float}), "expected sequences of items from 0 to 59"),
        ("sequences", lambda f: f.drop(columns="item_id"), "cannot be read"),
        ("users", lambda f: f.iloc[1:], r"expected the users 0 to \d+ of interactions\.parquet, each once"),
        ("users", lambda f: f.assign(source_id="x"), "user 'x' is there twice"),
        ("users", lambda f: f.astype({"source_id": "category"}).assign(source_id=1), "column source_id: expected text"),
    ],
)
def test_kept_files_are_read_with_care(napo: Call, run: Run, name: str, change: Any, pattern: str) -> None:
    without_hashes(run)
    changed_table(run.path / f"{name}.parquet", change)
    refused(napo, run, rf"{name}\.parquet: .*{pattern}")


def test_a_sasrec_of_another_run_is_refused(napo: Call, run: Run) -> None:
    torch.manual_seed(3)
    SASRec(60, SASRecOptions(dim=16)).save(run.path / "sasrec")
    line = r"sasrec: was changed after it was finished, or is of another run \(expected .*; put it back, or run what "
    refused(napo, run, line, "recommend", "--run", run.path, "--history", "3", "--model", "sasrec")
    refused(napo, run, line, "evaluate", "--data", run.data, "--run", run.path, "--models", "sasrec")
    without_hashes(run)
    SASRec(61, SASRecOptions(dim=16)).save(run.path / "sasrec")
    refused(napo, run, "sasrec: knows 61 items, expected 60", "recommend", "--run", run.path, "--history", "3")


def test_a_sasrec_whose_scores_overflow_is_refused(napo: Call, run: Run) -> None:
    without_hashes(run)
    file = run.path / "sasrec" / "sasrec.safetensors"
    save_file({name: t * 1e-44 if name == "deviation" else t for name, t in load_file(file).items()}, file)
    refused(napo, run, r"sasrec\.safetensors: its scores are not finite", "recommend", "--run", run.path, "--user", "3")


def test_a_model_of_other_data_is_refused(napo: Call, run: Run) -> None:
    changed_json(run.path / "models" / "napo" / "origin.json", lambda o: o | {"data_sha256": "cd" * 32})
    without_hashes(run)
    line = r"models/napo was trained on other data \(sha256 cdcdcdcdcdcd\) than the run's"
    refused(napo, run, line, "recommend", "--run", run.path, "--user", "3", "--model", "napo")
    refused(napo, run, line, "evaluate", "--data", run.data, "--run", run.path, "--models", "napo")
    refused(napo, run, line, "export", "--run", run.path, "--model", "napo", "--out", run.path.parent / "out")


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"lora_alpha": float("nan")}, "lora_alpha nan; expected a number above 0"),
        ({"lora_alpha": 1e300}, r"lora_alpha 1e\+300; expected a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha 16; expected a number above 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "lora_alpha -1; expected a number above 0"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is not supported"),
        ({"megatron_config": {}}, "megatron_config is not supported"),
    ],
)
def test_settings_of_an_adapter_are_checked(napo: Call, run: Run, change: dict, pattern: str) -> None:
    changed_json(run.path / "models" / "napo" / "adapter_config.json", lambda settings: settings | change)
    without_hashes(run)
    command = ("recommend", "--run", run.path, "--user", "3", "--model", "napo")
    refused(napo, run, rf"models/napo/adapter_config\.json does not fit the model \({pattern}", *command)


def weight(value: Any) -> Callable[[Any], None]:
    return lambda fitted: fitted["parts"]["napo"].update(weight=value)


@pytest.mark.parametrize(
    "change",
    [
        weight("1.5"),
        weight(True),
        weight(1e300),
        weight(float("nan")),
        lambda fitted: fitted["parts"]["sasrec"].update(deviation=0),
        lambda fitted: fitted["parts"].clear(),
        lambda fitted: fitted["parts"].update(other=fitted["parts"].pop("sasrec")),
        lambda fitted: fitted["lists"].clear(),
        lambda fitted: fitted["validation"].pop("napo+sasrec") and None,
        lambda fitted: fitted["validation"].update(x={"hr@1": 1.0, "mrr": 1.0}),
        lambda fitted: [fitted],
    ],
)
def test_a_changed_combination_is_refused(napo: Call, run: Run, change: Any) -> None:
    changed_json(run.path / "combinations" / "napo+sasrec.json", change)
    without_hashes(run)
    line = r"napo\+sasrec\.json: not a combination that this napo fitted; run napo combine .* --model napo"
    refused(napo, run, line, "recommend", "--run", run.path, "--user", "3", "--model", "napo+sasrec")


@pytest.mark.parametrize(
    "change",
    [
        lambda stamp: stamp.update(seconds=10**400),
        lambda stamp: stamp.update(seconds=float("nan")),
        lambda stamp: stamp.update(outputs=[]),
        lambda stamp: {"replacing": True},
    ],
)
def test_a_changed_stamp_is_refused(napo: Call, run: Run, change: Any) -> None:
    changed_json(run.path / "stages" / "sasrec.json", change)
    refused(napo, run, r"sasrec\.json: not the stamp of a stage; delete it", "report", run.path, "--out", "r.md")


def test_what_a_run_says_of_itself_is_what_it_wrote(napo: Call, run: Run) -> None:
    report = ("report", run.path, "--out", run.path.parent / "r.md")
    for name, change, remedy in (
        ("stages/sasrec.json", {"seconds": 3}, "delete it and run again"),
        ("config.json", {"dataset": "MovieLens-20M"}, "undo the change, or begin another run folder"),
    ):
        whole = (run.path / name).read_bytes()
        changed_json(run.path / name, lambda value, change=change: value | change)
        refused(napo, run, rf"{name}: was changed after .* \(expected sha256 \w+, got \w+\); {remedy}", *report)
        (run.path / name).write_bytes(whole)
    assert napo(*report)[0] == 0


@pytest.mark.parametrize(
    "name, change",
    [
        ("adapter_config.json", lambda settings: settings.update(lora_alpha=2 * settings["lora_alpha"])),
        ("adapter_config.json", lambda settings: settings.update(target_modules=settings["target_modules"][1:])),
        ("origin.json", lambda origin: origin.update(history=origin["history"] - 1)),
    ],
)
def test_numbers_of_a_model_that_were_changed_by_hand_are_refused(napo: Call, run: Run, name: str, change: Any) -> None:
    path = run.path / "models" / "napo" / name
    whole = path.read_bytes()
    changed_json(path, change)
    line = rf"models/napo/{name}: was changed after .* got \w+\); put it back, or run what made it \(napo train "
    model = ("--run", run.path, "--model", "napo")
    refused(napo, run, line, "recommend", *model, "--user", "3")
    refused(napo, run, line, "export", *model, "--out", run.path.parent / "exported")
    assert f"{name}: was changed after it was finished" in table_text(run)
    path.write_bytes(whole)
    (run.path / "models" / "napo" / "README.md").write_text("which nobody computes with")
    assert napo("recommend", *model, "--user", "3")[0] == 0


def test_a_changed_log_of_a_training_is_refused(napo: Call, run: Run) -> None:
    changed_json(run.path / "models" / "napo" / "log_history.json", lambda log: log[0].update(loss=0.0))
    refused(napo, run, r"log_history\.json: was changed after it was finished", "report", run.path, "--out", "r.md")


def test_a_changed_copy_of_the_data_is_refused_and_made_anew(napo: Call, run: Run) -> None:
    report = ("report", run.path, "--out", run.path.parent / "r.md")
    assert napo(*report)[0] == 0
    before = (run.path.parent / "r.md").read_text()
    changed_json(run.path / "dataset.json", lambda meta: meta["counts"].update(users=10**6))
    refused(
        napo, run, r"dataset\.json is not what the run was made with .*; run the command again that trained", *report
    )
    run.adopt(run.data, run.check_data(run.data))  # as that command does, also where its stage is skipped
    assert napo(*report)[0] == 0 and (run.path.parent / "r.md").read_text() == before


def test_a_run_of_an_older_napo_is_taken_and_said_once(napo: Call, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    recommend = ("recommend", "--run", run.path, "--user", "3", "--model", "napo", "--json")
    before = napo(*recommend)
    config = {name: value for name, value in run.config.items() if name != "kept_sha256"}
    write_json(run.path / "config.json", config)
    for path in (run.path / "stages").glob("*.json"):  # stamps knew outputs only as a whole
        changed_json(path, lambda stamp: {name: stamp[name] for name in stamp if name not in ("files", "sha256")})
    caplog.clear()
    for _ in range(2):
        assert napo(*recommend)[:2] == before[:2]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "has no hash of config.json, as a run of an older napo" in said[0], said
    changed_json(run.path / "models" / "napo" / "adapter_config.json", lambda settings: settings.update(lora_alpha=1))
    refused(napo, run, r"models/napo: was changed after it was finished", *recommend)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def link_to_itself(path: Path) -> None:
    link(path, Path(path.name))


def other_deviation(path: Path) -> None:
    changed_json(path, lambda fitted: fitted["parts"]["napo"].update(deviation=1.5))


@pytest.mark.parametrize(
    "name, change, why",
    [
        ("combinations/napo+sasrec.json", other_deviation, r"napo\+sasrec\.json: was changed after it was finished"),
        ("combinations/napo+sasrec.json", link_to_itself, r"napo\+sasrec\.json: .*expected sha256 .*, got no file"),
        ("combinations/napo+sasrec.json", pipe, r"napo\+sasrec\.json: .*expected sha256 .*, got no file"),
        ("combinations/napo+sasrec.json", folder, r"napo\+sasrec\.json: .*expected sha256 .*, got \w+"),
        (
            "combinations/napo+sasrec.json",
            Path.unlink,
            r"napo\+sasrec\.json is gone; run napo combine --data .* --model napo",
        ),
        (
            "models/napo/adapter_config.json",
            link_to_itself,
            r"adapter_config\.json: .*expected sha256 .*, got no file",
        ),
        ("models/napo/adapter_config.json", pipe, r"adapter_config\.json: .*expected sha256 .*, got no file"),
        ("models/napo/adapter_config.json", Path.unlink, r"adapter_config\.json: no such file"),
        ("models/napo", shutil.rmtree, "a part of it is gone"),
    ],
)
def test_who_takes_another_model_says_so(
    napo: Call, run: Run, caplog: pytest.LogCaptureFixture, name: str, change: Any, why: str
) -> None:
    """The best one is not what was fitted: the next one is taken with a word, and one that was asked for is refused."""
    recommend = ("recommend", "--run", run.path, "--user", "3")
    change(run.path / name)
    assert napo(*recommend)[0] == 0
    said = [record.getMessage() for record in caplog.records]
    taken = best_model(run)
    assert len(said) == 1 and re.search(
        rf"^model: napo\+sasrec is passed over \(.*{why}.*; {re.escape(taken)} is taken$", said[0]
    )
    refused(napo, run, r"napo\+sasrec|adapter_config", *recommend, "--model", "napo+sasrec")
    caplog.clear()
    assert Recommender.from_run(run.path).model == taken != "napo+sasrec"
    assert [record.getMessage() for record in caplog.records] == said


def test_a_model_that_is_gone_is_told_by_its_file(napo: Call, run: Run) -> None:
    shutil.rmtree(run.path / "combinations")
    why = r"has no 'napo\+sasrec', as .*combinations/napo\+sasrec\.json is gone; it has"
    refused(napo, run, why, "recommend", "--run", run.path, "--user", "3", "--model", "napo+sasrec")
    with pytest.raises(ValueError, match=why):
        find(run, "napo+sasrec")


def test_a_model_is_trained_again_as_the_error_says(napo: Call, run: Run) -> None:
    recommend = ("recommend", "--run", run.path, "--user", "3", "--model", "napo+sasrec", "--json")
    before = napo(*recommend)
    options = read_json(run.path / "stages" / "napo.json")["options"]["options"]
    settings = run.path / "models" / "napo" / "adapter_config.json"
    changed_json(settings, lambda settings: settings.update(lora_alpha=2 * settings["lora_alpha"]))
    refused(napo, run, r"run what made it \(napo train --name napo\) again with --overwrite$", *recommend)
    sets = [f"--set={name}={json.dumps(value)}" for name, value in options.items()]
    again = ("train", "--data", run.data, "--run", run.path, "--name", "napo", *sets)
    refused(napo, run, "napo was changed after it was finished; pass --overwrite to make it again", *again)
    assert napo(*again, "--overwrite")[0] == 0
    assert napo(*recommend) == before


def test_a_combination_is_fitted_again_as_the_error_says(napo: Call, run: Run) -> None:
    recommend = ("recommend", "--run", run.path, "--user", "3", "--model", "napo+sasrec", "--json")
    before = napo(*recommend)
    other_deviation(run.path / "combinations" / "napo+sasrec.json")
    refused(napo, run, r"put it back, or run napo combine --data \S+ --run \S+ --model napo$", *recommend)
    assert napo("combine", "--data", run.data, "--run", run.path, "--model", "napo")[0] == 0
    assert napo(*recommend) == before


def test_without_the_sasrec_that_it_had_the_whole_catalogue_is_ranked_with_a_word(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run.path / "sasrec")
    Recommender.from_run(run.path, model="napo")
    assert [record.getMessage() for record in caplog.records] == [
        f"run: {run.path / 'sasrec'} is gone, so napo ranks the whole catalogue"
    ]


@pytest.mark.parametrize(
    "change", [pipe, folder, link_to_itself, lambda path: link(path, path.parent / "items.parquet")]
)
def test_a_lock_that_is_no_file_is_refused(napo: Call, run: Run, change: Any) -> None:
    """Who holds it is written into it: a link would have that written over any file of the user's."""
    before = content_hash(run.path / "items.parquet")
    change(run.path / ".lock")
    refused(napo, run, r"\.lock: .*(expected a file|is a link)", "combine", "--data", run.data, "--run", run.path)
    assert content_hash(run.path / "items.parquet") == before


@pytest.mark.parametrize(
    "kept", [3, [], {"items.parquet": 3}, {"items.parquet": "changed"}, {"data": "", "dataset": ""}]
)
def test_a_changed_config_is_refused(napo: Call, run: Run, kept: Any) -> None:
    path = run.path / "config.json"
    path.write_text(json.dumps(read_json(path) | {"kept_sha256": kept}))
    refused(napo, run, r"config\.json: kept_sha256( items\.parquet| data)?: expected a sha256, got ")


def test_a_changed_hash_in_the_config_is_named_too(napo: Call, run: Run) -> None:
    path = run.path / "config.json"
    config = read_json(path)
    config["kept_sha256"]["items.parquet"] = "0" * 64
    path.write_text(json.dumps(config))
    refused(napo, run, r"config\.json: was changed after it was written \(expected sha256 \w+, got \w+\)")
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "sha256"}))
    refused(napo, run, r"items\.parquet is not what .*expected sha256 000")
