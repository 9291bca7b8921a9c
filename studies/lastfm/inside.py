"""What goes on inside training: how many borrowed negatives are false, and whose gradients move the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napo.catalogue import CatalogueScorer, Trie
from napo.data.prepared import PreparedData
from napo.data.prompts import PromptEncoder
from napo.data.windows import met_items
from napo.evaluation import metrics
from napo.files import content_hash, write_json
from napo.finetuning.options import PreferenceOptions
from napo.finetuning.preferences import drawn_rows
from napo.identity import adapter_hash
from napo.language_models.loading import autocast, load_model, load_tokenizer
from napo.objectives import OBJECTIVES
from napo.options import made
from napo.recommenders.sasrec import SASRec
from napo.runs import Run
from napo.trainer import NAPOConfig, NAPOTrainer
from napo.trainer.collator import PreferenceBatch
from napo.trainer.losses import pool_margin, preference_losses
from napo.trainer.pool import UsersAndNegatives, build_pool
from napo_kernels import DynamicMargin
from studies.lastfm.config import SFT, Trial

if TYPE_CHECKING:
    from studies.lastfm.study import Study

FOLDER = "inside"
NAPO = OBJECTIVES["napo"]
WAYS = [(source, neighbours) for source in ("uniform", "popularity", "sasrec") for neighbours in ("similar", "random")]


def false_negatives_stage(study: Study, seed: int) -> None:
    """``RUN/inside/false_negatives.json``: no model is needed, only who borrows from whom."""
    run, data = study.run(seed), study.data()
    options = study.size.preference_options(Trial(name="napo"))
    output = f"{FOLDER}/false_negatives.json"

    def work(aside: Path) -> None:
        (aside / FOLDER).mkdir(exist_ok=True)
        encoder, trie = _encoder(data, study.size.model)
        records = []
        for source, neighbours in WAYS:
            chosen = made(PreferenceOptions, {**options, "negatives_from": source, "neighbours": neighbours})
            records.append(
                {"negatives": source, "neighbours": neighbours, **_false(study, seed, encoder, trie, chosen)}
            )
        write_json(aside / output, records)

    run.stage(
        "inside-false-negatives",
        work,
        options=options,
        inputs={"data": run.check_data(data.path), "sasrec": content_hash(run.path / "sasrec")},
        outputs=[output],
        ask=False,
    )


def _false(
    study: Study, seed: int, encoder: PromptEncoder, trie: Trie, chosen: PreferenceOptions
) -> dict[str, float | None]:
    """Of what users could borrow the share that is left out, since they have it in their history, and of what they
    borrow the share that they meet later."""
    met = met_items(study.data())
    left_out = borrowed = false = 0
    for rows in _micro_batches(study, seed, encoder, trie, chosen):
        pool = build_pool(_users(rows), rho=NAPO.rho)
        if pool.share is None:
            continue
        share, ids = pool.share.numpy().copy(), pool.rejected_ids.numpy()
        np.fill_diagonal(share, False)
        for user, row in enumerate(rows):
            theirs = ids[share[user]].ravel()
            known = {*row["history_ids"], row["chosen_id"]}
            before = np.isin(theirs, list(known))
            later = met.get(int(row["user_id"]), set()) - known if "user_id" in row else set()
            left_out += int(before.sum())
            borrowed += int((~before).sum())
            false += int(np.isin(theirs[~before], list(later)).sum())
    return {
        "borrowed": borrowed,
        "left_out_share": left_out / max(left_out + borrowed, 1),
        "false_share": false / max(borrowed, 1) if study.data().has_users else None,  # else nobody's later is known
    }


def _users(rows: list[dict[str, Any]]) -> UsersAndNegatives:
    ids = np.array([row["rejected_ids"] for row in rows])
    return UsersAndNegatives(
        mask=torch.ones(ids.shape, dtype=torch.bool),
        groups=torch.from_numpy(metrics.user_groups([row.get("user_id") for row in rows])),
        states=torch.tensor([row["user_state"] for row in rows]),
        scores=None,
        rejected_ids=ids,
        chosen_ids=np.array([row["chosen_id"] for row in rows]),
        histories=[np.array(row["history_ids"]) for row in rows],
    )


def gradients_stage(study: Study, seed: int, name: str) -> None:
    """``RUN/inside/gradients-NAME.json``: the gradients of NAPO's loss at the model ``name``, taken apart."""
    run, data = study.run(seed), study.data()
    options = study.size.preference_options(Trial(name="napo"))
    output = f"{FOLDER}/gradients-{name}.json"

    def work(aside: Path) -> None:
        (aside / FOLDER).mkdir(exist_ok=True)
        write_json(aside / output, _gradients(study, run, seed, name, made(PreferenceOptions, options)))

    run.stage(
        f"inside-gradients-{name}",
        work,
        options={**options, "batches": study.size.inside_batches},
        inputs={"data": run.check_data(data.path), "model": adapter_hash(run.adapter(name))},
        outputs=[output],
        ask=False,
    )


def _gradients(study: Study, run: Run, seed: int, name: str, chosen: PreferenceOptions) -> list[dict[str, float]]:
    """Of each micro-batch the norms over all trained parameters of the parts that add up to the gradient, and the mass
    of each part: the sum of the loss's gradient in its log-probabilities."""
    origin = run.origin(name)
    model, tokenizer = load_model(origin.base, adapter=run.adapter(name), trainable=True, seed=seed)
    encoder, trie = _encoder(study.data(), study.size.model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scorer = CatalogueScorer(model)
    margin = DynamicMargin(NAPO.gamma, NAPO.alpha, 0.9, chosen.granularity, False)
    found = []
    for rows in _micro_batches(study, seed, encoder, trie, chosen)[: study.size.inside_batches]:
        batch = _collated(model, tokenizer, trie, rows)
        pool = build_pool(batch.users_and_negatives, rho=NAPO.rho, shared_gradient=False)
        if pool.share is None:
            continue
        with autocast(model):
            logps = scorer(batch.packed)
        target, own = logps[batch.slots[:, 0]], logps[batch.slots[:, 1:]]
        values = {"chosen": target, "own": own, "borrowed": own}
        leaves = {part: value.detach().clone().requires_grad_() for part, value in values.items()}
        rejected = torch.cat((leaves["own"], leaves["borrowed"]))
        losses = preference_losses(NAPO, leaves["chosen"], rejected, pool, pool_margin(margin, NAPO, pool, None, None))
        upstream = dict(zip(leaves, torch.autograd.grad(losses.mean(), list(leaves.values())), strict=True))
        record = {"loss": float(losses.detach().mean())}
        for part, value in values.items():
            gradients = torch.autograd.grad((value * upstream[part]).sum(), parameters, retain_graph=True)
            record[f"norm_{part}"] = float(torch.stack([g.double().pow(2).sum() for g in gradients]).sum().sqrt())
            record[f"mass_{part}"] = float(upstream[part].abs().sum())
        found.append(record)
    return found


def _micro_batches(
    study: Study, seed: int, encoder: PromptEncoder, trie: Trie, chosen: PreferenceOptions
) -> list[list[dict[str, Any]]]:
    """The rows of a training with these options, by micro-batch."""
    run, data = study.run(seed), study.data()
    prompt, sasrec = run.origin(SFT).prompt, SASRec.load(run.path / "sasrec", num_items=data.num_items)
    drawn = drawn_rows(data, encoder, sasrec, chosen, prompt, trie=trie, rho=NAPO.rho, seed=seed)
    rows, size = drawn.rows, drawn.batch_size
    return [rows[begin : begin + size] for begin in range(0, len(rows) - size + 1, size)]


def _collated(model: Any, tokenizer: Any, trie: Trie, rows: list[dict[str, Any]]) -> PreferenceBatch:
    """The rows as the trainer's batch."""
    with tempfile.TemporaryDirectory() as folder:
        config = NAPOConfig(output_dir=folder, objective="napo", report_to="none")
        trainer = NAPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer, trie=trie)
    examples: Any = trainer.train_dataset
    return trainer.collator(examples.examples)["batch"].to(trainer.args.device)


def _encoder(data: PreparedData, model: str) -> tuple[PromptEncoder, Trie]:
    encoder = PromptEncoder(load_tokenizer(model), data.titles, noun=data.noun, style="history")
    return encoder, Trie.of(encoder.answers)
