"""Options: flags, ``--set``, ``run.yaml``, listings, and exit codes."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from command_calls import Call

from napo import cli
from napo.command_line.flags import SHOWN, STAGES, options_by_name, options_class, reader_options, section_values
from napo.command_line.run_file import SECTIONS
from napo.data.sources import SOURCES
from napo.files import read_json
from napo.finetuning.options import PreferenceOptions, SFTOptions
from napo.options import Range, UsageError, made, nested, options_of, parsed, settings
from napo.recommenders.options import SASRecOptions


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, demo_run: Any) -> list[dict[str, Any]]:
    """Records the arguments of the stages; nothing is trained."""
    seen: list[dict[str, Any]] = []
    for stage in ("sasrec", "sft", "train"):
        monkeypatch.setattr(
            f"napo.stages.{stage}_stage",
            lambda run, data, _stage=stage, **given: seen.append({"stage": _stage, **given}),
        )
    return seen


@dataclass(frozen=True, kw_only=True)
class Inner:
    r: Annotated[int, Range(1)] = 16
    """Rank."""


@dataclass(frozen=True, kw_only=True)
class Some:
    """Options of nothing."""

    count: Annotated[int | None, Range(1)] = None
    """So many."""
    rate: Annotated[float, Range(0, 1)] = 0.5
    """How much."""
    kind: Literal["a", "b"] = "a"
    """What."""
    on: bool = False
    inner: Inner = Inner()
    """More."""
    free: float = 0.0
    """Any number."""


def test_options_know_their_types_ranges_and_sentences() -> None:
    count, rate, kind, on, inner, free = options_of(Some)
    assert (count.expected, count.sentence) == ("a whole number of at least 1 or null", "So many.")
    assert rate.expected == "a number between 0 and 1"
    assert (kind.expected, kind.choices) == ("a, b", ("a", "b"))
    assert (on.is_flag, on.sentence) == (True, "")
    assert inner.kinds == () and free.expected == "a number"
    assert made(Some, {"inner.r": 4, "rate": 1}) == Some(inner=Inner(r=4), rate=1.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"count": 1.5}, "count: expected a whole number or null, got 1.5"),
        ({"count": True}, "count: expected a whole number or null, got True"),
        ({"rate": 1.1}, "rate: expected between 0 and 1, got 1.1"),
        ({"rate": float("nan")}, "rate: expected between 0 and 1, got nan"),
        ({"free": float("nan")}, "free: expected a finite number, got nan"),
        ({"free": float("-inf")}, "free: expected a finite number, got -inf"),
        ({"free": 10**400}, "free: expected a number, got 1000"),
        ({"kind": "c"}, "kind: expected a, b, got 'c'"),
        ({"inner.r": 0}, "inner.r: expected at least 1, got 0"),
        ({"inner": 3}, "inner: expected options by name, as in inner.r=8, got 3"),
        ({"rate.r": 3}, "rate: expected a number, got"),
        ({"off": 1}, "off: no such option; expected one of count, rate, kind, on, inner, free"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        made(Some, given)


@pytest.mark.parametrize(
    "text, value",
    [
        ("False", False),
        ("true", True),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("3", 3),
        ("None", None),
        ("x", "x"),
        ("-.5e2", -50),
    ],
)
def test_values_mean_what_they_say(text: str, value: Any) -> None:
    assert parsed(text) == value
    assert isinstance(parsed(text), bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    "text, value",
    [("05", "05"), ("1252", "1252"), ("true", "true"), ('"0"', "0"), ('"', '"'), ("null", None), ("1e5", "1e5")],
)
def test_text_stays_text(text: str, value: str | None) -> None:
    assert parsed(text, reader_options()["encoding"]) == value
    assert (
        parsed("4.5", reader_options()["min_rating"]) == 4.5 and parsed("true", reader_options()["only_read"]) is True
    )


def test_columns_may_be_called_by_numbers(tmp_path: Path, napo: Call) -> None:
    """As pandas writes those without names."""
    rows = "".join(f"{user},{item},{item}\n" for user in range(8) for item in range(user, user + 12))
    (tmp_path / "interactions.csv").write_text("0,1,02\n" + rows)
    (tmp_path / "items.csv").write_text("1,2\n" + "".join(f"{item},Title {item}\n" for item in range(20)))
    named = {"user_column": 0, "item_column": 1, "time_column": "02", "title_column": 2, "encoding": 1252}
    small = {"min_user": 1, "min_item": 1, "candidates": 2, "min_history": 1}
    given = [word for name, value in {**named, **small}.items() for word in ("--set", f"{name}={value}")]
    code, out, err = napo("prepare", "csv", tmp_path, "--out", tmp_path / "out", *given)
    assert code == 0 and "19 items, 8 users, 96 interactions" in out, err


def test_dotted_names_are_mappings() -> None:
    assert nested({"a": 1, "b.c": 2, "b.d": 3}) == {"a": 1, "b": {"c": 2, "d": 3}}
    with pytest.raises(UsageError, match=r"b\.c: b was given as 1"):
        nested({"b": 1, "b.c": 2})


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_has_a_sentence_and_every_shown_name_is_one(stage: str) -> None:
    described = dict(options_by_name(stage))
    assert all(option.sentence for option in described.values()), described
    assert set(SHOWN[stage].split()) <= set(described)
    assert {name.partition(".")[0] for name in described} == {field.name for field in fields(options_class(stage))}


@pytest.mark.parametrize("kind", [SASRecOptions, SFTOptions, PreferenceOptions])
def test_defaults_are_in_their_ranges(kind: type) -> None:
    kind()


@pytest.mark.parametrize("stage", STAGES)
def test_options_lists_them_all(napo: Call, stage: str) -> None:
    code, out, _ = napo("options", stage)
    assert code == 0
    for name, option in options_by_name(stage):
        assert re.search(rf"^{re.escape(name)}  \({re.escape(option.expected)}; default ", out, re.MULTILINE)
        assert option.sentence in " ".join(out.split())


@pytest.mark.parametrize("source, module", SOURCES.items())
def test_options_of_prepare_are_those_of_the_sources_too(napo: Call, source: str, module: str) -> None:
    of_source = options_of(importlib.import_module(f"napo.data.sources.{module}").Options)
    assert all(option.sentence for option in of_source)
    parts = napo("options", "prepare")[1].split("\nWith ")[1:]
    texts = [text for text in parts if source in re.split(", | also, ", text.splitlines()[0])]
    assert len(texts) == (1 if of_source else 0)
    names = [line.partition("  (")[0] for text in texts for line in text.splitlines()[1:] if "; default " in line]
    assert names == [option.name for option in of_source]


def test_napo_alone_and_version(napo: Call) -> None:
    code, out, err = napo()
    assert (code, err) == (0, "") and "Commands:" in out and "napo demo" in out
    code, out, err = napo("--version")
    assert (code, err) == (0, "") and re.fullmatch(r"napo \d+\.\d+\.\d+\S*\n", out)


def common(demo_run: Any, tmp_path: Path) -> list[object]:
    return ["--data", demo_run.path / "data", "--run", tmp_path / "run"]


def test_flags_reach_the_stage(napo: Call, calls: list[dict[str, Any]], demo_run: Any, tmp_path: Path) -> None:
    flags = [
        "--tokens",
        "300",
        "--learning-rate",
        "1e-4",
        "--lora-r",
        "4",
        "--loss-on",
        "sequences",
        "--set",
        "warmup=.5",
    ]
    assert napo("sft", *common(demo_run, tmp_path), *flags)[0] == 0
    assert calls[-1]["options"] == {
        "tokens": 300,
        "learning_rate": 1e-4,
        "lora": {"r": 4},
        "loss_on": "sequences",
        "warmup": 0.5,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"format": 2}')
    assert napo("train", *common(demo_run, tmp_path), "--prefixes", "--min-history", 1, "--no-average")[0] == 0
    assert calls[-1]["options"] == {"prefixes": True, "min_history": 1, "average": False}
    assert calls[-1]["objective"] == calls[-1]["name"] == "napo"


def test_usage_of_flags_exits_2(napo: Call, demo_run: Any, tmp_path: Path) -> None:
    for arguments, pattern in (
        (("sft", "--tokens", "many"), r"tokens: expected a whole number or null, got 'many' \(see `napo sft --help`\)"),
        (("sft", "--tokens", "0"), "tokens: expected at least 1, got 0"),
        (("sft", "--epochs", "-1"), "epochs: expected more than 0, got -1"),
        (("sft", "--dtype", "int8"), "dtype: expected auto, bf16, fp16, fp32, got 'int8'"),
        (("sft", "--lora-r", "0"), "lora.r: expected at least 1, got 0"),
        (("sft", "--tokens", "3", "--set", "tokens=4"), "tokens: given as a flag and with --set"),
        (("sasrec", "--heads", "3"), "dim: expected a multiple of heads=3, got 64"),
        (("evaluate", "--tokens-per-batch", "x"), "no config.json|tokens_per_batch: expected a whole number, got 'x'"),
    ):
        code, _, err = napo(arguments[0], *common(demo_run, tmp_path), *arguments[1:])
        assert err.count("\n") == 1 and re.search(pattern, err), err
        assert code == (1 if "config.json" in err else 2)
    assert not (tmp_path / "run").exists()


def test_the_template_is_whole_and_runs_as_it_is(napo: Call, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    assert napo("init", file)[0] == 0
    text = file.read_text()
    for stage in STAGES.keys() & set(SECTIONS):
        for name, _ in options_by_name(stage):
            assert f"{name}: " in text, name
    assert set(yaml.safe_load(text)) == {"run", "data", "seed", "threads", *SECTIONS}
    # Without the # before each name the file has the same meaning, spelled out.
    (tmp_path / "bare.yaml").write_text(re.sub(r"^  #(?=\w)", "  ", text, flags=re.MULTILINE))
    for stage in ("sasrec", "sft", "train"):
        given = section_values(tmp_path / "bare.yaml", cli.COMMANDS[stage], None)[1]
        asked = section_values(file, cli.COMMANDS[stage], None)[1]
        assert len(given) == len([name for name, _ in options_by_name(stage) if name != "seed"])
        assert made(options_class(stage), given) == made(options_class(stage), asked)
    code, _, err = napo("init", file)
    assert code == 2 and "is there; pass --overwrite" in err
    assert napo("init", file, "--overwrite")[0] == 0


def test_one_stage_of_a_file(napo: Call, calls: list[dict[str, Any]], demo_run: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {tmp_path / 'run'}\ndata: {demo_run.path / 'data'}\nseed: 3\n"
        "sft:\n  tokens: 500\n  learning_rate: 1e-4\n  name: sft\n  lora: {r: 4, alpha: 8}\n"
        "sasrec:\n"
    )
    assert napo("sft", "--config", file, "--tokens", "600", "--lora-r", "2")[0] == 0
    assert calls[-1]["options"] == {"tokens": 600, "learning_rate": 1e-4, "lora": {"r": 2, "alpha": 8}}
    assert calls[-1]["seed"] == 3
    assert napo("sasrec", "--config", file, "--seed", 4)[0] == 0
    assert (calls[-1]["seed"], calls[-1]["options"]) == (4, {})


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("sft: {token: 3}", r"run.yaml: sft: token: no such option; expected one of .*tokens"),
        ("sft: {tokens: many}", "tokens: expected a whole number or null, got 'many'"),
        ("stf: {tokens: 3}", "run.yaml: stf: expected one of run, data, seed"),
        ("sft: 3", "run.yaml: sft: expected options by name"),
        ("sft: [{tokens: 3}, {tokens: 4}]", "run.yaml has 2 entries for sft; say which one: --entry 1"),
        ("sft: {tokens: 3", "run.yaml:1: not YAML"),
        ("- sft", "expected keys and sections, got list"),
        ("", "expected keys and sections, got NoneType"),
    ],
)
def test_faults_of_a_file_are_said(napo: Call, demo_run: Any, tmp_path: Path, text: str, pattern: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = napo("sft", *common(demo_run, tmp_path), "--config", tmp_path / "run.yaml")
    assert code == 2 and err.count("\n") == 1 and re.search(pattern, err), err
    code, _, err = napo("sft", *common(demo_run, tmp_path), "--config", tmp_path / "none.yaml")
    assert code == 2 and "No such file" in err


def test_all_stages_of_a_file(napo: Call, small_world: Path, tmp_path: Path) -> None:
    """Prepared, trained, judged and reported by one command; called again, nothing is done twice."""
    file = tmp_path / "run.yaml"
    document: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "data": str(tmp_path / "data"),
        "threads": 1,
        "prepare": {
            "source": "recbole",
            "path": str(small_world / "files"),
            "min_user": 2,
            "min_item": 1,
            "test_users": 20,
            "val_users": 10,
        },
        "sasrec": {"max_epochs": 2},
        "sft": {"model": str(small_world / "model"), "examples": 32, "lora": {"r": 4}},
        "train": [{"users": 16, "negatives": 3}, {"objective": "sdpo", "users": 16, "negatives": 3}],
        "evaluate": {"models": ["popularity", "napo", "sdpo"], "limit": 10, "greedy": False},
        "report": {"out": str(tmp_path / "report.html")},
    }
    file.write_text(yaml.safe_dump(document | {"evaluate": {"limits": 10}}))
    code, _, err = napo("run", "--config", file)
    assert code == 2 and "evaluate: limits: no such option" in err and not (tmp_path / "data").exists()
    file.write_text(yaml.safe_dump(document))
    code, out, err = napo("run", "--config", file)
    assert code == 0, err
    assert [record["model"] for record in read_json(tmp_path / "run" / "metrics.json")] == [
        "popularity",
        "sdpo",
        "napo",
    ]
    assert (tmp_path / "report.html").is_file()
    code, out, err = napo("run", "--config", file)
    assert code == 0, err
    for stage in ("sasrec", "sft", "napo", "sdpo", "evaluate-napo"):
        assert f"{stage}: finished before" in out
    assert "data is there, skipped" in out
    file.write_text(yaml.safe_dump(document | {"prepare": {**document["prepare"], "min_user": 3}}))
    code, _, err = napo("run", "--config", file)
    assert code == 1 and "was prepared with min_user 2, and" in err


def test_settings_are_names_and_values() -> None:
    described = dict(options_by_name("sft"))
    given = settings(["lora.r=64", "dtype=float32", "learning_rate=.5", "lora.r=8"], "--set", described)
    assert given == {"lora.r": 8, "dtype": "float32", "learning_rate": 0.5}
    for wrong in ("lora.r", "=3", "a b=3"):
        with pytest.raises(UsageError, match=re.escape(f"--sft: expected NAME=VALUE; got {wrong!r}")):
            settings([wrong], "--sft")
