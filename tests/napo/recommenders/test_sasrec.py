"""SASRec and the classical baselines."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import data_files
import numpy as np
import pytest
import torch
from data_files import prepare
from safetensors.torch import load_file, save_file

from napo.data.prepared import PreparedData
from napo.recommenders import baselines, sasrec
from napo.recommenders import sasrec_training as training
from napo.recommenders.baselines import ItemKNN, Popularity, SequentialRules
from napo.recommenders.options import SASRecOptions
from napo.recommenders.sasrec import SCORED_TOGETHER, SASRec, export_rows
from napo.recommenders.sasrec_training import Subsequences, full_rank_ndcg, sequence_loss, train_sasrec

QUICK = {
    "dim": 16,
    "heads": 2,
    "max_length": 8,
    "dropout": 0.1,
    "batch_size": 32,
    "max_epochs": 30,
    "learning_rate": 1e-2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Everybody walks the catalogue in steps of one or two: what comes next can be learnt."""
    folder = tmp_path_factory.mktemp("walks")
    random = np.random.default_rng(0)
    rows = []
    for user in range(80):
        place = int(random.integers(data_files.ITEMS))
        for step in range(14):
            rows.append((user, place, data_files.START + step))
            place = (place + int(random.integers(1, 3))) % data_files.ITEMS
    (folder / "in").mkdir()
    data_files.csv(folder / "in", rows)
    return prepare("csv", folder / "in", folder / "out", test_users=16, val_users=8, rows_per_user=0)


@pytest.fixture(scope="module")
def trained(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> tuple[SASRec, Path]:
    run = tmp_path_factory.mktemp("run")
    return train_sasrec(data, run, SASRecOptions(**QUICK)), run


def hit_rate(model: object, data: PreparedData) -> float:
    lists, target = np.stack(data.test["candidates"]), data.test["next"].to_numpy()
    scores = model.scores(list(data.test["full_history"]), lists)
    return float((lists[np.arange(len(lists)), scores.argmax(1)] == target).mean())


def test_learns_what_popularity_cannot(trained: tuple[SASRec, Path], data: PreparedData) -> None:
    assert hit_rate(trained[0], data) > 0.6 > 0.3 > hit_rate(Popularity.of(data), data)


def test_state_does_not_depend_on_padding_or_company(trained: tuple[SASRec, Path]) -> None:
    model = trained[0]
    histories = [[1, 2], [3], list(range(8)), list(range(20)), []]
    together = model.user_states(histories)
    for state, history in zip(together, histories, strict=True):
        torch.testing.assert_close(state, model.user_states([history])[0], rtol=1e-4, atol=1e-5)
    assert (together[-1] == 0).all()
    torch.testing.assert_close(together[3], model.user_states([list(range(12, 20))])[0], rtol=1e-4, atol=1e-5)
    pad = model.num_items
    padded = model.user_states([[1, 2, pad, pad], [pad, pad, 3], [pad]])
    torch.testing.assert_close(padded[:2], together[:2], rtol=1e-4, atol=1e-5)
    assert (padded[2] == 0).all()


def test_scores_are_bilinear_and_standardised(trained: tuple[SASRec, Path], data: PreparedData) -> None:
    model = trained[0]
    sequences = data.training_sequences()
    every = np.tile(np.arange(data.num_items), (len(sequences), 1))
    scores = torch.from_numpy(model.scores(sequences, every)).float()
    states = model.user_states(sequences)
    torch.testing.assert_close(scores, states @ model.item_vectors.T + model.item_bias, rtol=1e-4, atol=1e-4)
    assert scores.mean(1).abs().max() < 1e-4
    assert float(scores.square().mean().sqrt()) == pytest.approx(1.0, abs=1e-3)
    plain = states @ model.items.weight[:-1].T + model.bias
    assert (plain.argsort(1) == scores.argsort(1)).float().mean() > 0.99


def test_probabilities_are_a_softmax_over_what_is_new(trained: tuple[SASRec, Path], data: PreparedData) -> None:
    model, _ = trained
    pad = model.num_items
    histories = [[3, 4, 6], [], [1], list(range(pad))]
    found = model.probabilities(histories)
    np.testing.assert_array_equal(
        model.probabilities([[3, 4, 6, pad], [pad], [pad, 1], []]), [*found[:1], *found[1:2], *found[2:3], found[1]]
    )
    raw = model.user_states(histories) @ model.items.weight[:-1].T + model.bias  # not standardised
    for row, history in enumerate(histories):
        if not 0 < len(history) < model.num_items:
            assert not found[row].any()  # nothing is known, or nothing is left
            continue
        raw[row, history] = -torch.inf
        np.testing.assert_allclose(found[row], raw[row].softmax(0).detach(), rtol=1e-4, atol=1e-7)


def test_beginnings_of_one_history_score_as_they_do_alone(trained: tuple[SASRec, Path]) -> None:
    model, _ = trained
    items = np.random.default_rng(0).integers(0, model.num_items, model.options.max_length + 5).tolist()
    histories = [items[:end] for end in (0, 1, 2, 7, 3, 0, len(items) - 1, len(items))]
    histories += [[number % model.num_items] for number in range(2 * SCORED_TOGETHER)]  # several blocks of lines
    together = model.all_scores(histories)
    np.testing.assert_array_equal(together, np.concatenate([model.all_scores([history]) for history in histories]))
    expected = model.user_states(histories) @ model.item_vectors.T + model.item_bias
    np.testing.assert_allclose(together, expected.double(), rtol=1e-4, atol=1e-4)


def test_exported_rows(trained: tuple[SASRec, Path], data: PreparedData, tmp_path: Path) -> None:
    export_rows(trained[0], data, tmp_path)
    for split in ("train", "val", "test"):
        rows, exported = getattr(data, split), load_file(tmp_path / f"{split}.safetensors")
        histories = list(rows["full_history"])
        torch.testing.assert_close(exported["states"], trained[0].user_states(histories))
        scores = trained[0].scores(histories, np.stack(rows["candidates"]))
        np.testing.assert_allclose(exported["scores"], scores, rtol=1.3e-6, atol=1e-5)


def test_saved_and_loaded_and_trained_again_it_is_the_same(
    trained: tuple[SASRec, Path], data: PreparedData, tmp_path: Path
) -> None:
    loaded = SASRec.load(trained[1] / "sasrec")
    train_sasrec(data, tmp_path, SASRecOptions(**QUICK))
    again = SASRec.load(tmp_path / "sasrec").state_dict()
    for name, tensor in trained[0].state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and torch.equal(tensor, again[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sasrec"]
    with pytest.raises(ValueError, match="no SASRec there"):
        SASRec.load(tmp_path / "elsewhere")


def test_an_interrupted_training_ends_as_if_it_was_not(
    trained: tuple[SASRec, Path], data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    epochs = training._train_epoch

    def breaks(model: SASRec, *rest: object) -> float:
        if rest[-1] == 5:  # the epoch
            raise KeyboardInterrupt
        return epochs(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_train_epoch", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_sasrec(data, tmp_path, SASRecOptions(**QUICK))
    seen = []

    def counts(model: SASRec, *rest: object) -> float:
        seen.append(rest[-1])
        return epochs(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_train_epoch", counts)
    resumed = train_sasrec(data, tmp_path, SASRecOptions(**QUICK))
    assert seen[0] == 5
    for name, tensor in trained[0].state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("loss", ["ce", "sampled", "bce", "gbce"])
def test_every_loss_learns(loss: str, data: PreparedData, tmp_path: Path) -> None:
    settings = QUICK | {"loss": loss, "negatives": 20, "max_epochs": 80, "patience": 80}
    assert hit_rate(train_sasrec(data, tmp_path, SASRecOptions(**settings)), data) > 0.5


def test_sampled_softmax_estimates_the_full_one() -> None:
    torch.manual_seed(0)
    model = SASRec(2000, SASRecOptions(negatives=500))
    states, targets = torch.randn(50, 64), torch.randint(2000, (50,))
    full = sequence_loss(model, states, targets, "ce", torch.Generator()).item()
    generator = torch.Generator().manual_seed(0)
    drawn = [sequence_loss(model, states, targets, "sampled", generator).item() for _ in range(20)]
    assert np.mean(drawn) == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_subsequences_predict_each_target_once_from_what_came_before(seed: int | None) -> None:
    random = np.random.default_rng(9)
    sequences, first = [], []
    for user in range(30):
        length = int(random.integers(1, 40))
        sequences.append(1000 * user + np.arange(length))
        first.append(int(random.integers(0, max(length, 2))))
    subsequences = Subsequences(sequences, first, 7, pad=10**6)
    generator = None if seed is None else np.random.default_rng(seed)
    met = []
    for inputs, targets, counted in subsequences.batches(4, generator):
        for row, place in counted.nonzero().tolist():
            target = int(targets[row, place])
            met.append(target)
            context = inputs[row, : place + 1].tolist()
            assert context == list(range(target - len(context), target)), "what came directly before, in order"
            assert len(context) >= min(target % 1000, subsequences.length - subsequences.stride)
    wanted = [int(item) for sequence, start in zip(sequences, first, strict=True) for item in sequence[max(start, 1) :]]
    assert sorted(met) == sorted(wanted)


def test_errors_name_the_option() -> None:
    for options, message in (
        ({"loss": "mse"}, "loss: expected auto"),
        ({"dim": 10, "heads": 3}, "dim: expected a multiple"),
        ({"patience": 0}, "patience: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SASRecOptions(**options)
    model = SASRec(10)
    for history in ([3, 11], [-1]):
        with pytest.raises(ValueError, match="histories: expected item ids from 0 to 9"):
            model.user_states([history])


@pytest.mark.parametrize("kind", ["popularity", "itemknn", "rules", "sasrec"])
def test_scores_take_the_same_of_every_recommender(kind: str, data: PreparedData) -> None:
    makers = {
        "popularity": Popularity.of,
        "itemknn": ItemKNN,
        "rules": SequentialRules.of,
        "sasrec": lambda data: SASRec(data.num_items).eval(),
    }
    model, pad = makers[kind](data), data.num_items
    lists = np.stack(data.test["candidates"][:2])
    padded = model.scores([[1, 2, pad], [pad, 3]], lists)
    alone = model.scores([[1, 2], np.array([3])], torch.from_numpy(lists))
    np.testing.assert_allclose(padded, alone, rtol=1.3e-6, atol=1e-5)
    with pytest.raises(ValueError, match=r"item_ids: expected shape \(1, n\)"):
        model.scores([[3]], [1, 2])
    for ids in ([[0, -1]], [[0, pad]], [[0.5, 1.0]]):
        with pytest.raises(ValueError, match="item_ids: expected item ids from 0 to"):
            model.scores([[3]], ids)


def test_large_catalogues_take_many_bites(
    trained: tuple[SASRec, Path], data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, deviation and neighbours are the same when little may be in memory at a time."""
    model, knn = trained[0], ItemKNN(data)
    sequences, first = data.validation_sequences()
    subsequences = Subsequences(sequences, first, 8, data.num_items)
    states = model.user_states(sequences)
    histories, lists = list(data.test["history"]), np.stack(data.test["candidates"])

    def figures() -> list[float]:
        copy = SASRec(data.num_items, model.options)
        copy.load_state_dict(model.state_dict())
        copy.standardize(states)
        knn.rows.clear()
        return [full_rank_ndcg(copy, subsequences), float(copy.deviation), float(knn.scores(histories, lists).sum())]

    whole = figures()
    kept = sum(len(known) for known, _ in knn.rows.values())
    for of in (sasrec, training):
        monkeypatch.setattr(of, "MOST_LOGITS", 3 * data.num_items)
    monkeypatch.setattr(baselines, "MOST_KEPT", 2 * data.num_items)
    assert figures() == pytest.approx(whole, rel=1e-6)
    assert 0 < sum(len(known) for known, _ in knn.rows.values()) <= 2 * data.num_items < kept


def test_a_training_that_diverges_is_an_error(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: with 1e\+30 the loss became (nan|inf) in epoch"):
        train_sasrec(data, tmp_path, SASRecOptions(**QUICK | {"learning_rate": 1e30}))
    assert not (tmp_path / "sasrec").exists()
    one_step = QUICK | {"learning_rate": 1e30, "max_epochs": 1, "batch_size": 100_000}
    with pytest.raises(ValueError, match=r"learning_rate: with 1e\+30 the weights of epoch 1 give numbers that"):
        train_sasrec(data, tmp_path, SASRecOptions(**one_step))  # its loss was computed before the step
    assert not (tmp_path / "sasrec").exists()
    model = SASRec(data.num_items, SASRecOptions(dim=16))
    model.norm.weight.data[:] = torch.nan
    sequences, first = data.validation_sequences()
    assert full_rank_ndcg(model, Subsequences(sequences, first, 8, data.num_items)) == 0.0


def test_item_knn_is_the_cosine_of_co_occurrence(data: PreparedData) -> None:
    met = np.zeros((data.train["user_id"].nunique(), data.num_items))
    for row, sequence in enumerate(data.training_sequences()):
        met[row, sequence] = 1
    norms = np.maximum(np.linalg.norm(met, axis=0), 1e-12)
    cosine = met.T @ met / norms[:, None] / norms
    np.fill_diagonal(cosine, 0)
    histories = [list(history) for history in data.test["history"][:20]]
    lists = np.stack(data.test["candidates"][:20])
    wanted = [cosine[history].sum(0)[row] for history, row in zip(histories, lists, strict=True)]
    np.testing.assert_allclose(ItemKNN(data).scores(histories, lists), wanted, rtol=1e-5, atol=1e-7)
    few = ItemKNN(data, neighbours=3)
    assert all(len(few.row(item)[0]) <= 3 for item in range(data.num_items))


def test_rules_count_what_followed_by_its_distance(data: PreparedData) -> None:
    window = 3
    followed = np.zeros((data.num_items, data.num_items))
    for sequence in data.training_sequences():
        for place, item in enumerate(sequence):
            for distance, later in enumerate(sequence[place + 1 : place + 1 + window], 1):
                followed[item, later] += 1 / distance
    histories = [list(history) for history in data.test["full_history"][:20]]
    assert max(map(len, histories)) > window
    lists = np.stack(data.test["candidates"][:20])
    wanted = np.zeros((len(histories), data.num_items))
    for row, history in enumerate(histories):
        for back, item in enumerate(history[::-1][:window], 1):
            wanted[row] += followed[item] / back
    rules = SequentialRules.of(data, window=window)
    assert np.count_nonzero(wanted) > 100
    np.testing.assert_allclose(rules.all_scores(histories), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        rules.scores(histories, lists), np.take_along_axis(wanted, lists, 1), rtol=1e-5, atol=1e-7
    )
    other_way = [history[::-1] for history in histories]
    assert not np.allclose(rules.all_scores(other_way), wanted)  # order counts


@pytest.mark.skipif(
    "NAPO_SHARED" not in os.environ and not (Path(__file__).parents[4] / "shared/data/lastfm").is_dir(),
    reason="needs the LastFM files in shared/data (NAPO_SHARED)",
)
def test_popularity_on_the_lists_of_the_paper(tmp_path: Path) -> None:
    shared = Path(os.environ.get("NAPO_SHARED", Path(__file__).parents[4] / "shared"))
    lastfm = prepare("llara", shared / "data" / "lastfm", tmp_path / "out", noun="Artists")
    assert hit_rate(Popularity.of(lastfm), lastfm) == pytest.approx(0.257, abs=0.01)


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(Path(os.environ["PYTEST_EVIL"])),))


def test_a_wrong_checkpoint_counts_as_none(
    trained: tuple[SASRec, Path], data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setenv("PYTEST_EVIL", str(tmp_path / "owned"))
    folder = tmp_path / "run"
    checkpoint = folder / "sasrec.tmp" / "checkpoint.pt"
    kept = training._checkpoint

    def stops(*rest: Any) -> None:
        kept(*rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        train_sasrec(data, folder, SASRecOptions(**QUICK))
    monkeypatch.setattr(training, "_checkpoint", kept)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 1e9)
    whole, found = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)

    def saved(value: object) -> bytes:
        torch.save(value, buffer := io.BytesIO())
        return buffer.getvalue()

    nan = {name: tensor * float("nan") for name, tensor in found["model"].items()}
    short = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in found["model"].items()}
    cases = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "a byte short": whole[:-1],
        "zeros": b"\0" * len(whole),
        "text": b"hello",
        "flipped": bytes(b ^ 0xFF if len(whole) // 3 <= i < len(whole) // 3 + 40 else b for i, b in enumerate(whole)),
        "evil": saved(Evil()),
        "plain pickle": pickle.dumps({"a": 1}),
        "list": saved([1, 2]),
        "number": saved(3),
        "no identity": saved({"model": 1}),
        "no model": saved({"identity": found["identity"]}),
        "empty state": saved({**found, "state": {}}),
        "other shapes": saved({**found, "model": short}),
        "NaN": saved({**found, "model": nan}),
        "NaN kept": saved({**found, "state": {**found["state"], "weights": nan}}),
        "other optimizer": saved({**found, "optimizer": {"state": {}, "param_groups": []}}),
        "text for numbers": saved({**found, "state": {**found["state"], "epoch": "3"}}),
    }
    assert training._resume(checkpoint, found["identity"], *parts(data, found)) is not None
    for name, content in cases.items():
        checkpoint.write_bytes(content)
        model, optimizer, state = parts(data, found)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        resumed = training._resume(checkpoint, found["identity"], model, optimizer, state)
        if name != "flipped":  # may hit bytes that nothing reads
            assert resumed is None, name
        if resumed is None:
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), name
    assert not (tmp_path / "owned").exists()
    checkpoint.unlink()
    checkpoint.mkdir()
    again = train_sasrec(data, folder, SASRecOptions(**QUICK)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained[0].state_dict().items())


def parts(data: PreparedData, found: dict[str, Any]) -> tuple[SASRec, torch.optim.Optimizer, dict[str, Any]]:
    model = SASRec(data.num_items, SASRecOptions(**QUICK))
    state = {"epoch": 0, "best": -1.0, "best_epoch": -1, "weights": {}, "history": [], "seconds": 0.0}
    return model, torch.optim.AdamW(model.parameters(), 1e-2), state


def test_a_damaged_sasrec_is_said(trained: tuple[SASRec, Path], tmp_path: Path) -> None:
    trained[0].save(tmp_path / "sasrec")
    file, config = tmp_path / "sasrec" / "sasrec.safetensors", tmp_path / "sasrec" / "sasrec.json"
    weights, whole, said = load_file(file), file.read_bytes(), config.read_text()
    save_file({**weights, "bias": weights["bias"] * float("nan")}, file)
    with pytest.raises(ValueError, match="bias holds numbers that are not finite; delete it and run napo sasrec again"):
        SASRec.load(tmp_path / "sasrec")
    save_file({name: tensor for name, tensor in weights.items() if name != "bias"}, file)
    with pytest.raises(ValueError, match=r"cannot be loaded .*bias"):
        SASRec.load(tmp_path / "sasrec")
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        SASRec.load(tmp_path / "sasrec")
    file.write_bytes(whole)
    for text in ("[]", '{"num_items": "many", "options": {}}', '{"num_items": 3, "options": {"depth": 1}}', "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match="cannot be loaded"):
            SASRec.load(tmp_path / "sasrec")
    config.write_text(said)
    SASRec.load(tmp_path / "sasrec")
