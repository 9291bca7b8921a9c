"""What SASRec and the baselines reach, on the paper's LastFM lists and on MovieLens over the whole catalogue.

    python studies/sasrec.py lists PREPARED --seeds 0 --set dropout=0.5     # napo prepare llara lastfm/ --out PREPARED
    python studies/sasrec.py full PREPARED --seeds 0 1 2                    # napo prepare ... --split leave-last-out

"full" ranks the whole catalogue in two ways: among the items that the user has not met ("unmet", as SASRec's authors
did) and among all items, those that the user has met too ("all", as RecBole does by default). A tie is a miss.
Options are chosen on the validation figures; those of the test are printed beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import pandas as pd

from napo.data.prepared import PreparedData
from napo.evaluation.metrics import target_ranks, unmet_items
from napo.options import UsageError, made, settings
from napo.recommenders.baselines import ItemKNN, Popularity, SequentialRules
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import SASRec
from napo.recommenders.sasrec_training import train_sasrec


def lists_hit_rate(model: Any, rows: pd.DataFrame, history: str) -> float:
    """HR@1 over the rows' candidates."""
    candidates, target = np.stack(rows["candidates"]), rows["next"].to_numpy()
    scores = np.asarray(model.scores(list(rows[history]), candidates))
    return float((target_ranks(scores, (candidates == target[:, None]).argmax(1)) == 1).mean())


def full_rank(model: SASRec, rows: pd.DataFrame, k: int = 10) -> dict[str, tuple[float, float]]:
    """By protocol, HR@k and NDCG@k over the whole catalogue."""
    scores = (model.user_states(list(rows["full_history"])) @ model.item_vectors.T + model.item_bias).double().numpy()
    target = rows["next"].to_numpy()
    ranks = {
        "unmet": target_ranks(scores, target, unmet_items(list(rows["full_history"]), target, scores.shape[1])),
        "all": target_ranks(scores, target),
    }
    return {
        name: (float((rank <= k).mean()), float(np.where(rank <= k, 1 / np.log2(rank + 1), 0).mean()))
        for name, rank in ranks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("lists", "full"))
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="options", nargs="*", default=[], metavar="NAME=VALUE")
    chosen = parser.parse_args()
    try:
        options = [made(SASRecOptions, {**settings(chosen.options, "--set"), "seed": seed}) for seed in chosen.seeds]
    except UsageError as error:
        parser.error(str(error))
    data = PreparedData.load(chosen.data)
    if chosen.protocol == "lists":
        for name, baseline in (
            ("popularity", Popularity.of(data)),
            ("itemknn", ItemKNN(data)),
            ("rules", SequentialRules.of(data)),
        ):
            print(f"{name}: HR@1 val {lists_hit_rate(baseline, data.val, 'history'):.4f}", end=" ")
            print(f"test {lists_hit_rate(baseline, data.test, 'history'):.4f}")
    for own in options:
        began, busy = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory() as run:
            model = train_sasrec(data, run, own)
        print(f"seed {own.seed}: {time.monotonic() - began:.0f} s ({time.process_time() - busy:.0f} s of CPU)", end="")
        for name, rows in (("val", data.val), ("test", data.test)):
            if chosen.protocol == "lists":
                shown, full = (lists_hit_rate(model, rows, history) for history in ("history", "full_history"))
                print(
                    f"; {name} HR@1 {shown:.4f} (last 10 items), {full:.4f} (last {model.options.max_length})", end=""
                )
            else:
                for protocol, figures in full_rank(model, rows).items():
                    print("; {} {} items HR@10 {:.4f} NDCG@10 {:.4f}".format(name, protocol, *figures), end="")
        print(flush=True)


if __name__ == "__main__":
    main()
