"""Exact ranking of the catalogue and greedy decoding inside it, against scoring every item by the definition."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_catalogue import END, catalogue, plain_logps, prompts_of
from tiny_models import tiny_model

from napo.catalogue import CatalogueScorer, Trie, all_logps, best_items, greedy_items, pack_items, pack_nodes


def test_one_title_is_certain():
    model, trie = tiny_model("llama"), Trie.of([[5, 6, END], [5, 6, END]])
    batch = pack_items([[9, 8]], [[0, 1]], trie, pad_id=0)
    torch.testing.assert_close(CatalogueScorer(model)(batch).exp(), torch.tensor([0.5, 0.5]))
    assert batch.packed.num_tokens == 2 and not len(batch.rows)
    assert greedy_items(CatalogueScorer(model), [[9, 8]], trie, pad_id=0)[0].tolist() == [0]
    assert [item for item, _ in best_items(CatalogueScorer(model), [[9, 8]], trie, 5, pad_id=0)[0]] == [0, 1]
    assert all_logps(CatalogueScorer(model), [[9, 8]], trie, pad_id=0).tolist() == [[-math.log(2)] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_probabilities_of_all_items_sum_to_one(name, dtype):
    model, titles = tiny_model(name, dtype), catalogue(size=200)
    trie, prompts = Trie.of(titles), prompts_of((9, 17))
    everything = [list(range(len(titles)))] * 2
    logps = CatalogueScorer(model)(pack_items(prompts, everything, trie, pad_id=0)).view(2, -1)
    assert bool((logps <= 0).all())
    torch.testing.assert_close(logps.double().exp().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    by_nodes = all_logps(CatalogueScorer(model), prompts, trie, pad_id=0)
    torch.testing.assert_close(torch.from_numpy(by_nodes).float(), logps.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens_at_a_time", [1, 7, 50])
def test_a_catalogue_in_pieces_has_the_same_probabilities(tokens_at_a_time):
    model, titles = tiny_model("llama", torch.float64), catalogue(size=120)
    trie, prompts, passes = Trie.of(titles), prompts_of((9, 17)), []
    scorer = CatalogueScorer(model)

    def counted(batch):
        passes.append(batch.num_tokens - 9 - 17)
        return scorer(batch)

    whole = all_logps(scorer, prompts, trie, pad_id=0)
    pieces = all_logps(counted, prompts, trie, tokens_at_a_time=tokens_at_a_time, pad_id=0)
    torch.testing.assert_close(torch.from_numpy(pieces), torch.from_numpy(whole), rtol=1e-9, atol=1e-9)
    assert len(passes) > 1 and max(passes) <= 2 * max(tokens_at_a_time, max(map(len, titles)))


def test_the_whole_catalogue_places_the_branching_nodes():
    titles = catalogue(size=200)
    trie, prompt = Trie.of(titles), [20, 21, 22]
    branching = {tuple(trie.prefix(int(node))) for node in trie.branching}
    places = {node[:n] for node in branching for n in range(1, len(node) + 1)}
    nodes = pack_nodes([prompt], [trie.branching.tolist()], trie, pad_id=0)
    items = pack_items([prompt], [list(range(len(titles)))], trie, pad_id=0)
    assert nodes.packed.num_tokens == items.packed.num_tokens == len(prompt) + len(places)


@pytest.mark.parametrize("peak", [1.0, 6.0])
@pytest.mark.parametrize("nodes_at_a_time", [1, 8, 1000])
def test_the_walk_finds_what_brute_force_finds(peak, nodes_at_a_time):
    model, titles = tiny_model("llama", torch.float64), catalogue(size=300, tokens=(2, 30))
    model.get_output_embeddings().weight.data *= peak
    trie, prompts, scorer = Trie.of(titles), prompts_of((9, 17, 5)), CatalogueScorer(model)
    truth = plain_logps(model, titles, prompts, [list(range(len(titles)))] * 3).detach().view(3, -1)
    exclude = [set(), set(truth[1].topk(5).indices.tolist()), set(range(295))]
    for k in (1, 10, len(titles)):
        found = best_items(scorer, prompts, trie, k, exclude=exclude, nodes_at_a_time=nodes_at_a_time, pad_id=0)
        for user, best in enumerate(found):
            left = [item for item in range(len(titles)) if item not in exclude[user]]
            # Equal titles have equal scores: compared as the search computes them, rounded alike.
            expected = sorted(left, key=lambda item: (-round(truth[user, item].item(), 9), item))[:k]
            assert [item for item, _ in best] == expected
            torch.testing.assert_close(
                torch.tensor([logp for _, logp in best], dtype=torch.float64),
                truth[user, expected],
                rtol=1e-9,
                atol=1e-9,
            )


def test_the_walk_opens_what_it_must():
    """One node at a time: only those that are at least as probable as the last of the best items."""
    model, titles = tiny_model("llama", torch.float64), catalogue(size=1000, tokens=(2, 20))
    model.get_output_embeddings().weight.data *= 6
    trie, opened = Trie.of(titles), 0
    scorer, prompts = CatalogueScorer(model), prompts_of((9,))

    def counted(batch):
        nonlocal opened
        opened += len(batch.rows)
        return scorer(batch)

    best = best_items(counted, prompts, trie, 5, nodes_at_a_time=1, pad_id=0)[0]
    everything = all_logps(scorer, prompts, trie, pad_id=0)[0]
    below = {tuple(trie.prefix(int(node))): 0.0 for node in trie.branching}
    for item, title in enumerate(titles):
        for n in range(len(title)):
            if tuple(title[:n]) in below:
                below[tuple(title[:n])] += math.exp(everything[item])
    must = sum(probability >= math.exp(best[-1][1]) for probability in below.values())
    assert opened == must < len(trie.branching) / 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_greedy_decoding_names_a_title(name):
    """The best token at each step of the model's own forward, among those that continue some title."""
    model, titles = tiny_model(name, torch.float64), catalogue(size=100)
    prompts, passes = prompts_of((9, 17, 5, 12)), 0
    scorer = CatalogueScorer(model)

    def counted(batch):
        nonlocal passes
        passes += 1
        return scorer(batch)

    items, logps = greedy_items(counted, prompts, Trie.of(titles), pad_id=0)
    choices = []
    for prompt, item in zip(prompts, items.tolist(), strict=True):
        said, choices_here = [], 0
        while said not in titles or any(other[: len(said)] == said and len(other) > len(said) for other in titles):
            following = sorted({o[len(said)] for o in titles if len(o) > len(said) and o[: len(said)] == said})
            z = model(torch.tensor([prompt + said])).logits[0, -1]
            said.append(max(following, key=lambda token: z[token].item()))
            choices_here += len(following) > 1
        assert titles[item] == said and item == titles.index(said)
        choices.append(choices_here)
    assert passes == max(choices), "forced tokens take no pass"
    truth = plain_logps(model, titles, prompts, [[item] for item in items.tolist()]).detach()
    torch.testing.assert_close(torch.from_numpy(logps), truth, rtol=1e-9, atol=1e-9)


def test_nan_is_not_ranked():
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    for search in (greedy_items, all_logps, lambda *a, **o: best_items(*a, 3, **o)):
        with pytest.raises(ValueError, match="model: expected log-probabilities, got NaN"):
            search(CatalogueScorer(model), [[9, 8]], Trie.of(catalogue()), pad_id=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"k": 1, "nodes_at_a_time": 0}, "nodes_at_a_time: expected at least 1, got 0"),
        ({"k": 1, "exclude": []}, "exclude: expected one collection for each of 1 prompts, got 0"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        best_items(None, [[1]], Trie.of(catalogue()), pad_id=0, **options)
