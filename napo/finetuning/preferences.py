"""From a prepared data set and a SASRec to preference rows, and preference optimisation of a run's model on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from napo import ranks
from napo.catalogue import Trie, pack_items
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder, PromptSettings, shows_candidates
from napo.data.styles import continues
from napo.data.windows import Tiling, add_lists, draw_items, draw_windows, grow, met_items, window_rows
from napo.finetuning.options import PreferenceOptions
from napo.finetuning.reporting import reporters
from napo.finetuning.settings import begun_dtype, finish, of_dtype, settings, steps_of
from napo.language_models.loading import leave_out_auxiliary_loss, load_model
from napo.objectives import OBJECTIVES
from napo.recommenders.sasrec import SASRec
from napo.scoring import pack
from napo.trainer import NAPOConfig, NAPOTrainer
from napo_kernels import neighbour_count

RANDOM_STATE = 64
"""Numbers of a state that stands in place of SASRec's where neighbours are random."""


def train_preferences(
    data: PreparedData,
    run_dir: str | Path,
    options: PreferenceOptions | None = None,
    *,
    objective: str = "napo",
    name: str = "napo",
    model: str | Path,
    prompt: PromptSettings | None = None,
    init_from: str = "sft",
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    report_to: Sequence[str] = (),
) -> Path:
    """Train the run's model ``init_from`` on preferences over the training rows of ``data`` into ``RUN/models/NAME``.

    ``prompt``: how that model was trained; None: the style "history" with as many titles as the data's rows show.
    Returns the adapter's folder, with ``log_history.json`` in it. ``out`` takes the place of ``RUN/models/NAME``,
    and the checkpoints beside it stay; with ``resume`` those that are there are of this very training, which goes on at
    the last of them.
    ``report_to``: of napo.finetuning.reporting.REPORTERS; TensorBoard's files go to ``RUN/logs/NAME``.
    """
    prompt = prompt or PromptSettings(history=data.history_length)
    style = prompt.style
    chosen = (options or PreferenceOptions()).in_style(style)
    models = Path(run_dir) / "models"
    folder = out or models / name
    sasrec = SASRec.load(Path(run_dir) / "sasrec", num_items=data.num_items)
    dtype = begun_dtype(folder, chosen.dtype, resume=resume)
    llm, tokenizer = load_model(model, dtype=dtype, adapter=models / init_from, trainable=True, seed=seed)
    encoder = PromptEncoder(tokenizer, data.titles, noun=data.noun, style=style)
    trie = Trie.of(encoder.answers) if prompt.normalise == "catalogue" else None
    rho = OBJECTIVES[objective].rho if chosen.rho is None else chosen.rho
    drawn = drawn_rows(data, encoder, sasrec, chosen, prompt, trie=trie, rho=rho, seed=seed)
    rows, batch_size = drawn.rows, drawn.batch_size
    for line in (drawn.shortage, of_dtype(llm), leave_out_auxiliary_loss(llm)):
        if line is not None and ranks.rank() == 0:
            print(f"{name}: {line}")
    steps = steps_of(chosen.epochs, len(rows), batch_size * chosen.accumulation * ranks.size())
    trainer = NAPOTrainer(
        llm,
        NAPOConfig(
            **settings(folder, chosen, steps=steps, seed=seed, model=llm, resume=resume, report_to=report_to),
            objective=objective,
            beta=chosen.beta,
            gamma=chosen.gamma,
            alpha=chosen.alpha,
            rho=chosen.rho,
            average=chosen.average,
            sft_weight=chosen.sft_weight,
            granularity=chosen.granularity,
            pool=chosen.pool if chosen.accumulation > 1 else "batch",
            exact=chosen.exact,
            shared_gradient=chosen.shared_gradient,
            authors_compat=chosen.authors_compat,
            include_num_input_tokens_seen="non_padding",
            max_length=chosen.max_length,
            truncate_prompts=True,
            keep_prefix=encoder.prefix_length,
            answer_end="newline" if continues(style) else "eos",
            per_device_train_batch_size=batch_size,
            # Rows are drawn in random order above; those of one window must stay together to share their prompt.
            train_sampling_strategy="sequential" if chosen.prefixes else "random",
            gradient_accumulation_steps=chosen.accumulation,
            eval_strategy="no",
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        item_vectors=sasrec.item_vectors if chosen.granularity == "pair" else None,
        item_bias=sasrec.item_bias if chosen.granularity == "pair" else None,
        trie=trie,
        callbacks=[*reporters(report_to, Path(run_dir) / "logs" / name)],
    )
    return finish(trainer, folder, chosen, keep=out is not None)


@dataclass(frozen=True)
class DrawnRows:
    """``batch_size``: how many of the rows make a micro-batch. ``shortage``: what to say where rows did not get the
    negatives that the options ask for."""

    rows: list[dict[str, Any]]
    batch_size: int
    shortage: str | None


def drawn_rows(
    data: PreparedData,
    encoder: PromptEncoder,
    sasrec: SASRec,
    chosen: PreferenceOptions,
    prompt: PromptSettings,
    *,
    trie: Trie | None,
    rho: float,
    seed: int,
) -> DrawnRows:
    """The rows that a training of this seed goes through."""
    chosen = chosen.in_style(prompt.style)
    assert chosen.batch_size is not None
    rng = np.random.default_rng([seed, 1])  # other rows than SFT drew
    known = met_items(data)
    if chosen.prefixes:
        drawn = _windows(data, encoder, chosen, rng)
        if shows_candidates(prompt.style):
            drawn = add_lists(drawn, known, data.num_items, chosen.min_history, rng)
        picked = grow(drawn, chosen.min_history)
        per_window = len(picked) / max(picked["window"].nunique(), 1)
    else:
        picked, per_window = data.train.iloc[rng.permutation(len(data.train))[: chosen.users]], 1.0
        picked = picked.assign(history=[full[-prompt.history :] for full in picked["full_history"]])
    batch_size = round(chosen.batch_size * per_window)
    draw = NegativeSampler(chosen, sasrec, data.training_counts(), rng)
    rows = preference_rows(picked, encoder, sasrec, known, draw)
    if not rows:
        raise ValueError(f"data: {data.path} has no training rows; prepare a larger data set")
    if chosen.count_negatives:
        assert chosen.tokens is not None
        borrowed = neighbour_count(batch_size, rho) if chosen.exact else 0
        rows = _within(rows, batch_size, chosen.tokens, encoder, trie, borrowed)
    if chosen.neighbours == "random":
        for row, state in zip(rows, rng.standard_normal((len(rows), RANDOM_STATE)), strict=True):
            row["user_state"] = (state / np.linalg.norm(state)).tolist()  # of one length, so that none is near to all
    return DrawnRows(rows, batch_size, draw.shortage)


def _within(
    rows: list[dict[str, Any]], size: int, tokens: int, encoder: PromptEncoder, trie: Trie | None, borrowed: int
) -> list[dict[str, Any]]:
    """The first micro-batches of ``size`` rows for which ``tokens`` are computed, where every row also computes the
    negatives of ``borrowed`` others, as many as its own."""
    behind = np.array([len(line) - 1 for line in encoder.answers]) if trie is None else trie.inputs  # (items,)
    kept = spent = 0
    while kept < len(rows) and spent < tokens:
        batch = rows[kept : kept + size]
        prompts = [row["prompt"] for row in batch]
        if trie is None:
            spent += pack(prompts, [[row["chosen"], *row["rejected"]] for row in batch], pad_id=0).num_tokens
        else:
            items = [[row["chosen_id"], *row["rejected_ids"]] for row in batch]
            spent += pack_items(prompts, items, trie, pad_id=0).num_tokens
        spent += borrowed * sum(int(behind[row["rejected_ids"]].sum()) for row in batch)
        kept += size
    return rows[:kept]


def _windows(
    data: PreparedData, encoder: PromptEncoder, chosen: PreferenceOptions, rng: np.random.Generator
) -> pd.DataFrame:
    """Windows in random order, as ``grow`` takes them."""
    if chosen.window is None:
        return draw_windows(data.train, chosen.users, rng)
    tiling = Tiling(
        titles=chosen.window,
        lengths=np.array([len(line) for line in encoder.lines]),
        header=len(encoder.header),
        max_length=chosen.max_length,
    )
    windows, _ = tiling.budget(data.training_sequences(), rng, epochs=1.0, tokens=chosen.tokens)
    return window_rows(data.longest_training_rows(), windows[: chosen.users])


class NegativeSampler:
    """Draws the negatives of one row after another."""

    def __init__(
        self,
        options: PreferenceOptions,
        sasrec: SASRec,
        interactions: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> None:
        """``interactions`` (items,): how often the training users chose each item."""
        self.options = options
        self.rng = rng
        self.vectors = sasrec.item_vectors.float().numpy()  # (items, D)
        self.bias = sasrec.item_bias.float().numpy()  # (items,)
        with np.errstate(divide="ignore"):
            self.log_popularity = np.log(interactions.astype(np.float64))
        self.rows = self.short_lists = self.short_draws = 0

    @property
    def shortage(self) -> str | None:
        """What to say where rows did not get what the options ask for."""
        count, source = self.options.negatives, self.options.negatives_from
        if self.short_lists:
            return (
                f"negatives: the prompts of {self.short_lists} of {self.rows} rows list fewer than {count} titles "
                "beside the right ones; these rows have as many negatives as their lists have such titles"
            )
        if self.short_draws:
            what = "were ever chosen" if source == "popularity" else "are SASRec's best"
            return (
                f"negatives_from: {source}: for {self.short_draws} of {self.rows} rows too few items {what} and were "
                f"not met by the user; their {count} negatives were filled up with items drawn uniformly"
            )
        return None

    def from_list(self, others: Sequence[int]) -> list[int]:
        """Of the titles that a prompt lists."""
        self.rows += 1
        self.short_lists += len(others) < self.options.negatives
        return sorted(self.rng.choice(others, min(self.options.negatives, len(others)), replace=False).tolist())

    def __call__(self, met: set[int], state: Tensor) -> list[int]:
        """Different items outside ``met``, for a user with this state (D,) of SASRec."""
        count, source = self.options.negatives, self.options.negatives_from
        if source == "popularity":
            # The largest of log weight + Gumbel noise are a draw without replacement in proportion to the weights.
            weights = self.log_popularity.copy()
            weights[list(met)] = -np.inf
            wanted = count
            best = np.argsort(-(weights + self.rng.gumbel(size=len(weights))))[: min(count, np.isfinite(weights).sum())]
            drawn = best.tolist()
        elif source == "uniform":
            wanted, drawn = 0, []
        else:
            scores = self.vectors @ state.float().numpy() + self.bias
            scores[list(met)] = -np.inf
            best = np.argsort(-scores)[: min(self.options.negatives_best, len(scores) - len(met))]
            wanted = count if source == "sasrec" else (count + 1) // 2
            drawn = self.rng.choice(best, min(wanted, len(best)), replace=False).tolist()
        self.rows += 1
        self.short_draws += len(drawn) < wanted
        return drawn + draw_items(self.rng, len(self.bias), met | set(drawn), count - len(drawn))


def preference_rows(
    picked: pd.DataFrame,
    encoder: PromptEncoder,
    sasrec: SASRec,
    known: Mapping[Any, set[int]],
    draw: NegativeSampler,
) -> list[dict[str, Any]]:
    """Preference rows (``napo.trainer.rows``) of the picked training rows, prompts and titles as token ids.

    Negatives are drawn from the items that the user never met in all that is trained on (``known``), so that none is a
    title the user is about to choose. Where the prompt shows candidates, the negatives are the other titles of the
    row's list, without the other targets of the row's window.
    """
    histories = [full.tolist() for full in picked["full_history"]]
    states = sasrec.user_states(histories)
    rejected = []
    for index, row in enumerate(picked.itertuples(index=False)):
        targets = {int(row.next), *getattr(row, "targets", ())}
        if shows_candidates(encoder.style):
            others = [int(item) for item in row.candidates if int(item) not in targets]
            rejected.append(draw.from_list(others))
        else:
            met = known.get(row.user_id, set()) | {int(item) for item in row.full_history} | targets
            rejected.append(draw(met, states[index]))
    rows = []
    for index, (row, own) in enumerate(zip(picked.itertuples(index=False), rejected, strict=True)):
        candidates = row.candidates if shows_candidates(encoder.style) else None
        rows.append(
            {
                "prompt": encoder.prompt(row.history, candidates),
                "chosen": encoder.title(int(row.next)),
                "rejected": [encoder.title(item) for item in own],
                "user_state": states[index].tolist(),
                "rejected_scores": (states[index] @ sasrec.item_vectors[own].T + sasrec.item_bias[own]).tolist(),
                "chosen_id": int(row.next),
                "rejected_ids": own,
                "history_ids": histories[index],
            }
        )
        if not pd.isna(row.user_id):
            rows[-1]["user_id"] = str(row.user_id)
    return rows
