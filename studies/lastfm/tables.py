"""The tables of results.json as Markdown: what the account in README.md shows.

python -m studies.lastfm.tables runs/study-lastfm/results.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from napo.evaluation.metrics import BUCKETS
from napo.files import read_json
from napo.recommenders.registry import BASELINES
from studies.lastfm.config import CONTROL, MAIN, SFT, repeated
from studies.lastfm.results import SPLITS

FIRST = (*BASELINES, SFT, CONTROL, *(trial.name for trial in MAIN))
Row = Sequence[str]


def tables(results: Mapping[str, Any]) -> str:
    parts = []
    for split in SPLITS:
        if any(of_seed[split]["models"] for of_seed in results["seeds"].values()):
            parts += [models(results, split), contrasts(results, split)]
    return "\n\n".join(part for part in parts if part)


def models(results: Mapping[str, Any], split: str) -> str:
    """HR@1 is the mean over trainings, be they of several runs or repeats in one, and the span of them; the other
    figures are means as well. Of the trainings' times the least stands, since other work was beside them, and of their
    memory the most."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    trained: dict[str, list[Mapping[str, Any]]] = {}
    judged = [record for of_seed in results["seeds"].values() for record in of_seed[split]["models"].values()]
    lists = Counter(record["lists_sha256"] for record in judged).most_common(1)[0][0]  # as results.Judged has it
    for of_seed in results["seeds"].values():
        for name, record in of_seed[split]["models"].items():
            if record["lists_sha256"] != lists:
                continue
            found.setdefault(repeated(name), []).append(record)
            trained.setdefault(repeated(name), []).append(of_seed["models"].get(name, {}))
    head = (f"{split} lists", "trainings", "tokens", "least s", "GiB", "HR@1", "span", "MRR", *BUCKETS, "ARP")
    rows = []
    for name in _ordered(found):
        records = found[name]
        hits = [record["hr@1"] for record in records]
        seconds, peaks = ([of[key] for of in trained[name] if of.get(key)] for key in ("seconds", "peak_mib"))
        tokens = trained[name][0].get("tokens")
        rows.append(
            (
                f"`{name}`",
                str(len(hits)),
                f"{tokens:,}" if tokens else "",
                f"{min(seconds):,.0f}" if seconds else "",
                f"{max(peaks) / 1024:.1f}" if peaks else "",
                share(float(np.mean(hits))),
                f"{share(min(hits))} to {share(max(hits))}" if len(hits) > 1 else "",
                share(_mean(record["mrr"] for record in records)),
                *(_in_bucket(records, part) for part in BUCKETS),
                f"{_mean(record['arp'] for record in records):.1f}",
            )
        )
    return _table(head, rows)


def contrasts(results: Mapping[str, Any], split: str) -> str:
    """What the study asks first; empty where it was not asked yet."""
    head = (f"difference, {split} lists", "trainings", "HR@1", "95% interval", "each", "MRR", "ARP")
    rows = []
    for found in results["contrasts"][split]:
        hits, mrr, arp = (found[key] for key in ("hr@1", "mrr", "arp"))
        rows.append(
            (
                found["name"],
                str(found["seeds"]),
                share(hits["difference"], "+"),
                f"[{share(hits['ci'][0], '+')}, {share(hits['ci'][1], '+')}]",
                ", ".join(share(value, "+") for value in hits["each"]),
                f"{share(mrr['difference'], '+')} [{share(mrr['ci'][0], '+')}, {share(mrr['ci'][1], '+')}]",
                f"{arp['difference']:+.1f} [{arp['ci'][0]:+.1f}, {arp['ci'][1]:+.1f}]",
            )
        )
    return _table(head, rows) if rows else ""


def share(value: float, sign: str = "") -> str:
    """A share or a difference of shares, without the 0 before the point."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def _in_bucket(records: Sequence[Mapping[str, Any]], part: str) -> str:
    """HR@1 of lists whose right item is of this popularity; empty where there is no such list."""
    found = [record["hr@1_by_popularity"][part]["hr@1"] for record in records if part in record["hr@1_by_popularity"]]
    return share(_mean(found)) if found else ""


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _ordered(names: Iterable[str]) -> list[str]:
    """Those of FIRST, then the rest as they come."""
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _table(head: Row, rows: Sequence[Row]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(tables(read_json(parser.parse_args().results)))


if __name__ == "__main__":
    main()
