"""Reports of a run whose predictions are made up: one model knows the answer more often than the other."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from napo.evaluation import metrics
from napo.evaluation.evaluate import collect
from napo.evaluation.report import report, table_text
from napo.files import read_json, write_json
from napo.identity import adapter_hash
from napo.runs import Origin, Run

TITLES = ["Toy Story", 'Se<ven & "co"', *(f"Film | number {n}" for n in range(48))]
SKILL = {"popularity": 0.2, "sasrec": 1.0, "sft": 0.6, "sft-longer": 0.9, "napo": 1.6}


def origin(models: Path, name: str, seed: int) -> Origin:
    parent = None if name == "sft" else "sft"
    return Origin(
        by="sft" if parent is None else "train",
        model="tiny",
        model_identity="tiny",
        style="history",
        normalise="vocabulary",
        history=10,
        data_sha256="ab" * 32,
        parent=parent,
        parent_sha256=parent and adapter_hash(models / parent),
        seed=seed,
        options={},
    )


def fake_run(path: Path, *, seed: int = 0, rows: int = 200) -> Run:
    run = Run(path)
    run.configure(dataset="made up")
    items = pd.DataFrame({"item_id": range(50), "title": TITLES, "source_id": [str(item) for item in range(50)]})
    items.to_parquet(path / "items.parquet")
    write_json(path / "dataset.json", {"noun": "Items", "has_users": True, "options": {"history": 10, "seed": 0}})
    random = np.random.default_rng(seed)
    popularity = np.sort(random.integers(1, 300, 50))[::-1].copy()
    lists = np.stack([random.choice(50, 20, replace=False) for _ in range(rows)])
    columns = random.integers(0, 20, rows)
    targets = lists[np.arange(rows), columns]
    users = np.arange(rows) // 2
    histories = [[*random.choice(50, 4).tolist(), 1] for _ in range(rows)]
    (path / "predictions").mkdir()
    for name, skill in SKILL.items():
        scores = random.normal(size=(rows, 20)) + skill * (np.arange(20) == columns[:, None])
        ranks = metrics.target_ranks(scores, columns)
        best = lists[np.arange(rows), scores.argmax(1)]
        figures = metrics.ranking_figures(ranks)
        record = {
            "model": name,
            "n": rows,
            "users": 100,
            "seed": seed,
            **figures,
            "hr@1_ci": metrics.interval((ranks == 1).astype(float), users),
            **metrics.popularity_figures(best, histories, popularity),
            "hr@1_by_popularity": metrics.hits_by_popularity(ranks, targets, popularity),
            "protocol": {"split": "test", "candidates": 20, "score": "made up"},
            "lists_sha256": "ab" * 32,
        }
        if name in ("sft", "sft-longer", "napo"):
            record |= {"hr@1_greedy": 0.1, "valid_ratio": 0.9}
            folder = path / "models" / name
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
            (folder / "adapter_model.safetensors").write_bytes(name.encode())
            write_json(folder / "origin.json", origin(path / "models", name, seed))
            log = [{"step": step, "loss": 3 / step, "gamma": 1 + 0.01 * step} for step in range(1, 40)]
            write_json(folder / "log_history.json", log)
        write_json(path / "predictions" / f"{name}.json", record)
        frame = {"row": range(rows), "user": users, "next": targets, "rank": ranks, "recommended": best}
        pd.DataFrame({**frame, "history": histories, "scores": list(scores)}).to_parquet(
            path / "predictions" / f"{name}.parquet"
        )
    run.stage("napo", lambda aside: None, inputs={}, outputs=[], say=lambda _: None)
    collect(run)
    return run


class Links(HTMLParser):
    """Whatever a browser would fetch, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        self.fetched += [f"{key}={value}" for key, value in attrs if key in ("src", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    text = report([run], tmp_path / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.fetched == [] and links.open == []
    assert text.count("<svg") == 3  # hit rates, training, popularity
    assert "Se&lt;ven &amp;" in text and "Se<ven" not in text
    for name in SKILL:
        assert f">{name}</td>" in text
    assert report([run], tmp_path / "again.html").read_text() == text


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    text = report([fake_run(tmp_path / "run")], tmp_path / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.M):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "| napo | sft-longer |" in text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
    text = report(runs, tmp_path / "report.html").read_text()
    assert "seed1: napo" in text and "HR@1 by run" in text
    assert "| seed1 | napo | sft |" in report(runs, tmp_path / "report.md").read_text()


def test_terminal_table_prints_paired_differences(tmp_path: Path) -> None:
    text = table_text(fake_run(tmp_path / "run"))
    assert re.search(r"napo - sft-longer +[+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", text)


def test_bad_input(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.configure(dataset="made up")
    with pytest.raises(ValueError, match="run `napo evaluate` first"):
        report([run], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"\.html or \.md"):
        report([run], tmp_path / "report.pdf")


def test_names_with_dollar_signs_are_names(tmp_path: Path) -> None:
    """matplotlib would set them as formulas, or stop at one that it cannot parse."""
    run = fake_run(tmp_path / r"a$\frac{b$")
    other = fake_run(tmp_path / "$x_1$", seed=1)
    text = report([run, other], tmp_path / "report.html").read_text()
    assert text.count(r"a$\frac{b$: napo") >= 2 and "$x_1$: napo" in text
    code = report([run, fake_run(tmp_path / "<b>_x_|`", seed=2)], tmp_path / "report.md").read_text()
    assert r"\<b\>\_x\_\|\`" in code and "<b>" not in code


@pytest.mark.parametrize(
    "change",
    [
        {"lists_sha256": "<script>alert(1)</script>"},
        {"lists_sha256": 3},
        {"model": "../../sft"},
        {"model": "\x1b]0;owned\x07"},
        {"hr@1": float("nan")},
        {"hr@1": "0.9"},
        {"hr@1_ci": [0.1]},
        {"n": 0},
        {"protocol": {"candidates": 0}},
        {"protocol": []},
        {"hr@1_by_popularity": {"head": {}}},
    ],
)
def test_records_that_evaluate_did_not_write_are_refused(tmp_path: Path, change: dict) -> None:
    run = fake_run(tmp_path / "run")
    records = read_json(run.path / "metrics.json")
    write_json(run.path / "metrics.json", [{**records[0], **change}, *records[1:]])
    for out in ("report.html", "report.md"):
        with pytest.raises(ValueError, match=r"metrics\.json: not the records of napo evaluate") as caught:
            report([run], tmp_path / out)
        assert "\x1b" not in str(caught.value)
    path = run.path / "predictions" / "sft.json"
    write_json(path, {**read_json(path), **change})
    with pytest.raises(ValueError, match=r"sft\.json: not a record of napo evaluate"):
        collect(run)


def test_text_of_files_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    evil = "\x1b]0;owned\x07<script>x</script>"
    run.configure(dataset=evil)
    records = read_json(run.path / "metrics.json")
    records[0]["protocol"] |= {evil: evil, "data": evil}
    write_json(run.path / "metrics.json", records)
    write_json(run.path / "stages" / f"{evil.replace('/', '')}.json", read_json(run.path / "stages" / "napo.json"))
    write_json(run.path / "models" / "sft" / "log_history.json", [{"step": 1, "loss": "x"}, {"step": 2, "loss": 0.5}])
    page = report([run], tmp_path / "report.html").read_text()
    for text in (page, report([run], tmp_path / "report.md").read_text(), table_text(run)):
        assert "\x1b" not in text and "\x07" not in text
    assert "<script" not in page and "&lt;script&gt;" in page
    pairs = read_json(run.path / "comparisons.json")
    write_json(run.path / "comparisons.json", [{**pairs[0], "other": evil}])
    with pytest.raises(ValueError, match=r"comparisons\.json: not the comparisons"):
        table_text(run)


def test_rows_of_other_lists_are_marked(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    assert "lists" not in table_text(run)
    path = run.path / "predictions" / "napo.json"
    write_json(path, {**read_json(path), "lists_sha256": "cd" * 32})
    collect(run)
    for text in (
        table_text(run),
        report([run], tmp_path / "r.md").read_text(),
        report([run], tmp_path / "r.html").read_text(),
    ):
        assert "lists" in text and "cdcdcd" in text and "their figures do not compare" in text
