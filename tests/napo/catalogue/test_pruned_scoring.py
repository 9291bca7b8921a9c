"""Pruned, packed scores over the catalogue equal those of every whole title, one at a time behind its prompt."""

from __future__ import annotations

import pytest
import torch
from tiny_catalogue import END, catalogue, plain_logps, prompts_of
from tiny_models import ARCHITECTURES, assert_equal_gradients, tiny_model

from napo.catalogue import CatalogueScorer, Trie, pack_items, pack_windows


@pytest.mark.parametrize(
    "dtype, tolerance, grad_tolerance",
    [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-10, 1e-6)],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("true_softmax")
def test_equals_every_whole_title_alone(name, dtype, tolerance, grad_tolerance):
    model, titles = tiny_model(name, dtype), catalogue()
    trie = Trie.of(titles)
    prompts = prompts_of((9, 17, 7, 12))
    items = [[3, 0, 7, 28, 26], [29, 4, 4], [27], [11, 26, 13, 14, 15, 2, 29]]
    truth = plain_logps(model, titles, prompts, items)
    for row_tokens in (None, 20, 1000):
        batch = pack_items(prompts, items, trie, pad_id=0, row_tokens=row_tokens)
        logps = CatalogueScorer(model)(batch)
        torch.testing.assert_close(logps, truth, rtol=tolerance, atol=tolerance)
    assert_equal_gradients(model, logps, truth, grad_tolerance)
    average = CatalogueScorer(model, average=True)(batch)
    lengths = torch.tensor([len(titles[item]) for group in items for item in group])
    torch.testing.assert_close(average, truth / lengths, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_sliding"])
@pytest.mark.parametrize("negatives", [0, 3])
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.usefixtures("true_softmax")
def test_windows_equal_every_title_behind_those_before_it(name, negatives, first):
    model, titles = tiny_model(name, torch.float64), catalogue()
    trie, header = Trie.of(titles), [5, 6, 7]
    windows = [[3, 0, 7, 28, 26, 29, 3], [1, 2], [27], [11, 26, 13, 14]]
    generator = torch.Generator().manual_seed(3)
    places = [range(min(first, len(window) - 1), len(window)) for window in windows]
    others = [[torch.randint(len(titles), (negatives,), generator=generator).tolist() for _ in p] for p in places]
    prompts, items = [], []
    for window, at, rivals in zip(windows, places, others, strict=True):
        for place, rest in zip(at, rivals, strict=True):
            prompts.append([*header, *(token for item in window[:place] for token in titles[item])])
            items.append([window[place], *rest])
    batch = pack_windows(windows, trie, header=header, first=first, negatives=others, pad_id=0)
    truth = plain_logps(model, titles, prompts, items)
    logps = CatalogueScorer(model)(batch)
    torch.testing.assert_close(logps, truth, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(model, logps, truth, 1e-6)


def test_a_window_costs_its_titles_once():
    titles = catalogue()
    trie, header, window = Trie.of(titles), [5, 6, 7], [3, 0, 7, 28, 26]
    batch = pack_windows([window], trie, header=header, pad_id=0)
    whole = sum(len(titles[item]) for item in window[:-1])
    assert batch.packed.num_tokens == len(header) + whole + trie.inputs[window[-1]]
    assert batch.num_sequences == len(window)


def test_titles_stand_as_far_as_their_last_choice():
    titles = [[5, 6, 7, 8, END], [5, 9, 10, END], [4, 11, 12, END], [3, 3, 3, END], [3, 3, 2, END]]
    trie, prompt = Trie.of(titles), [20, 21]
    batch = pack_items([prompt], [[0, 1, 2, 3, 4]], trie, pad_id=0)
    assert batch.packed.num_tokens == len(prompt) + len([5]) + len([3, 3])
    # The root, behind 5 and behind 3 3: behind 3 nothing is to be chosen.
    assert len(batch.rows) == 3 and batch.allowed.sizes.sum() == 3 + 2 + 2


def test_a_prompt_that_ends_inside_a_title_of_another():
    """Its last token is at the root here and at a node there, in one row of hidden states."""
    model, titles = tiny_model("llama", torch.float64), [[5, 6, END], [5, 7, END], [6, 6, END], [6, 8, END]]
    prompts, items = [[9, 8], [9, 8, 5]], [[0, 1], [0, 2]]
    batch = pack_items(prompts, items, Trie.of(titles), pad_id=0)
    assert batch.packed.num_tokens == len([9, 8, 5, 5, 6]) and len(batch.rows) > len(set(batch.rows.tolist()))
    truth = plain_logps(model, titles, prompts, items)
    torch.testing.assert_close(CatalogueScorer(model)(batch), truth, rtol=1e-10, atol=1e-10)


def test_lora_on_body_and_head():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).to(torch.float64)
    titles, prompts, items = catalogue(), prompts_of((9, 7)), [[3, 0, 7], [29, 4]]
    truth = plain_logps(model, titles, prompts, items)
    logps = CatalogueScorer(model)(pack_items(prompts, items, Trie.of(titles), pad_id=0))
    torch.testing.assert_close(logps, truth, rtol=1e-10, atol=1e-10)
    assert_equal_gradients(model, logps, truth, 1e-6)


def test_pin_memory_and_device_keep_everything():
    batch = pack_items(prompts_of((9, 7)), [[3, 0], [4]], Trie.of(catalogue()), pad_id=0).to("meta")
    tensors = [batch.rows, batch.sharing, batch.lengths, batch.allowed.used, batch.allowed.pair_places]
    assert all(tensor.is_meta for tensor in [*tensors, batch.packed.input_ids]) and batch.num_sequences == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda trie: pack_items([[1]], [], trie, pad_id=0), "items: expected one list of items for each of 1 prompts"),
        (
            lambda trie: pack_items([[1]], [[30]], trie, pad_id=0),
            r"items: expected numbers in \[0, 30\) of the catalogue",
        ),
        (lambda trie: pack_items([[1]], [[-1]], trie, pad_id=0), r"items: expected numbers in \[0, 30\) .* got -1"),
        (lambda trie: pack_windows([[1], []], trie, header=[2], pad_id=0), "windows: .* got none in window 1"),
        (
            lambda trie: pack_windows([[1]], trie, header=[], pad_id=0),
            "header: expected a token before the first target",
        ),
        (
            lambda trie: pack_windows([[1, 2]], trie, header=[2], negatives=[[[3]]], pad_id=0),
            "negatives: expected a list for each of 2 targets of window 0, got 1",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(Trie.of(catalogue()))


def test_widened_rows_change_nothing():
    model, prompts, items = tiny_model("llama"), prompts_of((9, 7)), [[3, 0, 7], [29, 4]]
    batch = pack_items(prompts, items, Trie.of(catalogue()), pad_id=0, row_tokens=1)
    wide = batch.widened(64)
    assert wide.packed.input_ids.shape == (2, 64) > tuple(batch.packed.input_ids.shape)
    torch.testing.assert_close(CatalogueScorer(model)(wide), CatalogueScorer(model)(batch), rtol=1e-5, atol=1e-5)


def test_recorded_bodies_give_the_same(stand_in):
    model, prompts, items = tiny_model("llama"), prompts_of((9, 7)), [[3, 0, 7], [29, 4]]
    batch = pack_items(prompts, items, Trie.of(catalogue()), pad_id=0)
    expected = CatalogueScorer(model)(batch)
    scorer = CatalogueScorer(model, cuda_graphs=True)
    for _ in range(3):
        torch.testing.assert_close(scorer(batch), expected, rtol=1e-5, atol=1e-5)
