"""Reports of a run whose predictions are made up: one model knows the answer more often than the other."""

from __future__ import annotations

import json
import platform
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_calls import Call
from plotly.graph_objects import Figure

from napo.evaluation import metrics
from napo.evaluation.evaluate import collect
from napo.evaluation.report import report, table_text
from napo.evaluation.report.contents import Contents, verdicts
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
    meta = {"noun": "Items", "has_users": True, "options": {"history": 10, "seed": 0}}
    write_json(path / "dataset.json", meta | {"source": "csv", "counts": {"rows": {"test": rows}}, "steps": []})
    random = np.random.default_rng(0)  # the same lists, whatever the seed
    popularity = np.sort(random.integers(1, 300, 50))[::-1].copy()
    lists = np.stack([random.choice(50, 20, replace=False) for _ in range(rows)])
    columns = random.integers(0, 20, rows)
    targets = lists[np.arange(rows), columns]
    users = np.arange(rows) // 2
    histories = [[*random.choice(50, 4).tolist(), 1] for _ in range(rows)]
    (path / "predictions").mkdir()
    random = np.random.default_rng(seed)
    for name, skill in SKILL.items():
        scores = random.normal(size=(rows, 20)) + skill * (np.arange(20) == columns[:, None])
        ranks = metrics.target_ranks(scores, columns)
        best = lists[np.arange(rows), scores.argmax(1)]
        figures = metrics.ranking_figures(ranks)
        record = {
            "model": name,
            "n": rows,
            "users": rows // 2,
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


class Page(HTMLParser):
    """Whatever a browser would fetch, tags that do not match, and the figures' places with their alternative texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.plots: dict[str, str] = {}
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text, flags=re.S)
        self.figures = {figure["id"]: figure for figure in json.loads(data)}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("link", "img", "iframe") and not (named.get("href") or "").startswith("data:"):
            self.fetched.append(tag)
        self.fetched += [f"{key}={value}" for key, value in attrs if key in ("src", "data", "srcset", "action")]
        if named.get("class") == "plot":
            assert named["role"] == "img"
            self.plots[str(named["id"])] = str(named["aria-label"])
        if tag == "script":
            self.scripts.append(str(named.get("type")))
        if tag not in ("meta", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_one_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    text = report([run], tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.fetched == [] and page.open == []
    assert page.scripts == ["None", "application/json", "None"]  # Plotly, the figures, what draws them
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "Se&lt;ven &amp;" in text and "Se<ven" not in text
    for name in SKILL:
        assert f">{name}</td>" in text
    assert report([run], tmp_path / "again.html").read_text() == text


def test_every_figure_is_one_of_plotly_and_says_in_words_what_it_shows(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
    for chosen in (runs[:1], runs):
        page = Page(report(chosen, tmp_path / "report.html").read_text())
        assert page.plots.keys() == page.figures.keys()
        assert {"hit-rates", "forest-0", "bias-hr1", "bias-arp", "bias-gini", "bias-coverage"} <= page.plots.keys()
        for name, figure in page.figures.items():
            assert page.plots[name] == figure["alt"] and len(figure["alt"]) > 40
            for data in [figure["data"], *(choice["data"] for choice in figure["choices"].values())]:
                assert Figure(data=data, layout=figure["layout"]).data  # raises at what Plotly does not know


def test_the_forest_holds_the_paired_differences_of_each_model(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    choices = Page(report([run], tmp_path / "report.html").read_text()).figures["forest-0"]["choices"]
    assert next(iter(choices)) == "napo" and choices.keys() == SKILL.keys()
    pair = next(p for p in read_json(run.path / "comparisons.json") if (p["model"], p["other"]) == ("napo", "sft"))
    for one, other, sign in (("napo", "sft", 1), ("sft", "napo", -1)):
        (point,) = (point for point in choices[one]["data"] if point["y"] == [other])
        assert point["x"] == pytest.approx([sign * pair["hr@1_difference"]])
        low, high = pair["hr@1_difference_ci"]
        bounds = [sign * low, sign * high]
        assert point["x"][0] + point["error_x"]["array"][0] == pytest.approx(max(bounds))
        assert point["x"][0] - point["error_x"]["arrayminus"][0] == pytest.approx(min(bounds))


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    told = re.compile(r"napo is best: HR@1 0\.\d{3}, 0\.\d{3} above sasrec \(95% interval \+0\.\d{3} to \+0\.\d{3}; ")
    assert told.match(table_text(run))
    markdown = report([run], tmp_path / "report.md").read_text()
    assert told.search(markdown) and markdown.index("napo is best") < markdown.index("|")
    words = "".join(Page(report([run], tmp_path / "report.html").read_text()).words)
    assert told.search(words) and words.index("napo is best") < words.index("Ranking")


def test_examples_have_prompt_and_answers(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    text = report([run], tmp_path / "report.html").read_text()
    assert text.count('<details class="example"') == 60
    assert "Items chosen, in order:" in text and "Prompt of sft, sft-longer, napo" in text
    frame = pd.read_parquet(run.path / "predictions" / "napo.parquet")
    right = [name for name in SKILL if pd.read_parquet(run.path / f"predictions/{name}.parquet")["rank"].iloc[0] == 1]
    shown = re.search(r'<details class="example" data-right="([^"]*)"', text)
    assert shown is not None and set(shown[1].split()) == set(right)
    assert f"{TITLES[frame['next'].iloc[0]]}</span>" in text.replace("&lt;", "<").replace("&amp;", "&").replace(
        "&#34;", '"'
    )


def test_settings_data_and_machine_are_said(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    counts = {"users": 9, "items": 50, "interactions": 90, "rows": {"test": 200}}
    steps = [{"step": "read", "interactions": 100}, {"step": "5-core", "dropped": 10, "interactions": 90}]
    files: list[dict] = [{"name": "a.csv", "lines": 101, "bad_lines": 1, "sha256": "ab" * 32}]
    files += [{"name": "b.parquet", "rows": 102, "bad_rows": 2, "sha256": "ab" * 32}]
    files += [{"name": "c.json", "records": 103, "bad_records": 3, "sha256": "ab" * 32}]
    meta = {"source": "csv", "counts": counts, "steps": steps, "files": files, "options": {"seed": 3, "history": 10}}
    meta |= {"noun": "Items", "has_users": True}
    write_json(run.path / "dataset.json", meta)
    for name in ("report.html", "report.md"):
        text = report([run], tmp_path / name).read_text()
        assert "5-core: 10 of 100 interactions dropped (10.0%)" in text
        assert "a.csv: 101 lines, 1 bad lines" in text
        for told in ("b.parquet: 102 rows, 2 bad rows", "c.json: 103 records, 3 bad records"):
            assert told in text.replace("\\_", "_")
        assert f"python {platform.python_version()}" in text and "cores" in text
        assert "history, 10 titles, over the vocabulary" in text
    write_json(run.path / "dataset.json", {"counts": []})
    with pytest.raises(ValueError, match=r"dataset\.json: not what napo prepare writes"):
        report([run], tmp_path / "report.md")


def test_a_training_that_ended_earlier_claims_no_more(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one")
    path = run.path / "models" / "sft" / "steps.json"
    write_json(path, {"done": 59, "planned": 1123})
    report([run], tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text().count("; ended after step 59 of 1,123") == 1
    write_json(path, {"done": 1123, "planned": 1123})
    report([run], tmp_path / "report.md")
    assert "ended after" not in (tmp_path / "report.md").read_text()
    write_json(path, {"done": "59"})
    with pytest.raises(ValueError, match=r'steps.json: expected \{"done": steps, .*; delete it and train again'):
        report([run], tmp_path / "report.md")


def test_predictions_that_are_not_those_of_the_record_are_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    path = run.path / "predictions" / "sft.parquet"
    frame = pd.read_parquet(path)
    frame.assign(rank=1).to_parquet(path)
    with pytest.raises(ValueError, match=r"sft\.parquet: expected HR@1"):
        table_text(run)
    frame.assign(user=frame["user"][::-1].to_numpy()).to_parquet(path)
    with pytest.raises(ValueError, match="expected the same rows"):
        table_text(run)
    path.unlink()
    assert "Not compared, because their predictions are not in the run: sft." in table_text(run)


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    text = report([fake_run(tmp_path / "run")], tmp_path / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.M):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "| napo | sft-longer |" in text


def test_a_link_to_a_report_stays_one(tmp_path: Path) -> None:
    link, target = tmp_path / "link.md", tmp_path / "far" / "report.md"
    link.symlink_to(target)
    report([fake_run(tmp_path / "run")], link)
    assert link.is_symlink() and target.read_text().startswith("# napo")


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
    text = report(runs, tmp_path / "report.html").read_text()
    assert "HR@1 by model over runs" in text
    markdown = report(runs, tmp_path / "report.md").read_text()
    assert "| seed1 | napo | sft |" in markdown
    assert "napo is best" in markdown and "in every run" in markdown
    values = [next(r["hr@1"] for r in read_json(run.path / "metrics.json") if r["model"] == "napo") for run in runs]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    assert f"| napo | 2 | {mean:.3f} | {spread:.3f} | {values[0]:.3f} | {values[1]:.3f} |" in markdown


def test_terminal_table_prints_paired_differences(tmp_path: Path) -> None:
    text = table_text(fake_run(tmp_path / "run"))
    assert re.search(r"napo - sft-longer +[+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", text)


def test_bad_input(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.configure(dataset="made up")
    with pytest.raises(ValueError, match=r"run `napo evaluate --data \S+ --run \S+` first"):
        report([run], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"\.html or \.md"):
        report([run], tmp_path / "report.pdf")


def test_names_are_names_and_not_markup(tmp_path: Path) -> None:
    """Plotly takes <b> and <a href> in labels for markup, Markdown takes more."""
    runs = [fake_run(tmp_path / "<b>_x_|`$y$"), fake_run(tmp_path / "other", seed=1)]
    text = report(runs, tmp_path / "report.html").read_text()
    assert "<b>_x_" not in text and "&lt;b&gt;_x_|`$y$" in text
    hovers = json.dumps(Page(text).figures)
    assert "&lt;b&gt;_x_|`$y$" in hovers and "<b>_x_" not in hovers
    code = report(runs, tmp_path / "report.md").read_text()
    assert r"\<b\>\_x\_\|\`$y$" in code and "<b>" not in code


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
    run.configure(kept_sha256={})
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
    run.configure(dataset=evil, kept_sha256={})
    records = read_json(run.path / "metrics.json")
    records[0]["protocol"] |= {evil: evil, "data": evil}
    write_json(run.path / "metrics.json", records)
    write_json(run.path / "predictions" / f"{records[0]['model']}.json", records[0])
    write_json(run.path / "stages" / f"{evil.replace('/', '')}.json", read_json(run.path / "stages" / "napo.json"))
    write_json(run.path / "models" / "sft" / "log_history.json", [{"step": 1, "loss": "x"}, {"step": 2, "loss": 0.5}])
    page = report([run], tmp_path / "report.html").read_text()
    for text in (page, report([run], tmp_path / "report.md").read_text(), table_text(run)):
        assert "\x1b" not in text and "\x07" not in text
    assert len(Page(page).scripts) == 3 and "<script>x" not in page and "&lt;script&gt;" in page
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


def test_rows_of_other_splits_and_sizes_have_words_of_their_own(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "run"), fake_run(tmp_path / "less", rows=100)]
    for name in ("sft", "napo"):
        path = runs[0].path / "predictions" / f"{name}.json"
        record = read_json(path)
        protocol = record["protocol"] | {"split": "val", "candidates": 40}
        write_json(path, {**record, "lists_sha256": "cd" * 32, "protocol": protocol})
    collect(runs[0])
    first, second, less = verdicts([Contents.of(run) for run in runs])[:3]
    told = "These are validation rows"
    assert told not in " ".join(first.sentences + less.sentences) and told in " ".join(second.sentences)
    assert [verdict.rows for verdict in (first, second, less)] == [200, 200, 100]
    page = Page(report(runs, tmp_path / "r.html").read_text())
    text = " ".join(page.words)
    assert "200 rows of 100 held-out users, 100 rows of 50 held-out users · 20 candidates, 40 candidates" in text
    chances = [shape["x0"] for shape in page.figures["hit-rates"]["layout"]["shapes"]]
    assert chances == [1 / 40, 1 / 20]
    counts = [int(n) for n in re.findall(r"n = (\d+) or (\d+)", page.figures["buckets"]["data"][0]["x"][0])[0]]
    assert counts[0] < counts[1]


def test_the_seed_of_a_run_without_language_models(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    for name in ("sft", "sft-longer", "napo"):
        shutil.rmtree(run.path / "models" / name)
    assert Contents.of(run).seed == "0"
    for path in (run.path / "predictions").glob("*.json"):
        write_json(path, {**read_json(path), "seed": None})
    collect(run)
    assert Contents.of(run).seed == "?"
    run.stage("sasrec", lambda aside: None, options={"seed": 0}, inputs={}, outputs=[], say=lambda _: None)
    assert Contents.of(run).seed == "0"


def test_runs_of_one_name_are_told_apart_and_each_counts_once(tmp_path: Path, napo: Call) -> None:
    folders = [fake_run(tmp_path / name / "run", seed=seed).path for seed, name in enumerate("ab")]
    text = report([Run(folder) for folder in folders], tmp_path / "r.md").read_text().replace("\\_", "_")
    assert all(f"{folder} (seed {seed})" in text for seed, folder in enumerate(folders))
    again = tmp_path / "a" / ".." / "a" / "run"
    code, _, said = napo("report", folders[0], folders[1], again, "--out", tmp_path / "twice.md")
    assert code == 2 and f"{again} is given twice, and would count twice" in said
    assert not (tmp_path / "twice.md").exists()


def test_models_that_were_scored_in_other_ways_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    for name, rule in {"sft": "sum", "napo": "average"}.items():
        path = run.path / "predictions" / f"{name}.json"
        record = read_json(path)
        record["protocol"]["score"] = f"{rule} of the title's token log-probabilities, end token included"
        write_json(path, record)
        collect(run)
        told = "Titles were scored in several ways (sum by sft; average by napo)"
        for text in (table_text(run), report([run], tmp_path / "r.md").read_text()):
            assert (told in text) == (name == "napo")
