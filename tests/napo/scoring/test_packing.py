"""pack: every title token is predicted once, by a column that sees its prompt and its own title so far."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napo.scoring import pack
from napo.scoring.attention import block_mask, visible
from napo.scoring.unpacking import unpack

PAD = 9
tokens = st.integers(0, 5)  # few, so that titles often begin alike
title_lists = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=6)
users = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=12), title_lists), min_size=1, max_size=7)


@st.composite
def histories(draw):
    """Users of whom some are the one before them a few tokens later, or earlier."""
    drawn = []
    for prompt, titles in draw(users):
        drawn.append((prompt, titles))
        while draw(st.booleans()):
            shorter, own = draw(st.booleans()), draw(title_lists)
            last = drawn[-1][0]
            drawn.append((last[: max(len(last) // 2, 1)] if shorter else last + draw(title_lists)[0], own))
    return drawn


def contexts(batch):
    """For every pair, the tokens and positions that its predicting column sees, in order."""
    seen = visible(batch, None)
    width = batch.input_ids.shape[1]
    for at in batch.predicting_rows[batch.pair_rows].tolist():
        row, column = divmod(at, width)
        columns = seen[row, column]
        yield batch.input_ids[row][columns].tolist(), batch.position_ids[row][columns].tolist()


@settings(deadline=None, max_examples=200)
@given(
    histories(),
    st.booleans(),
    st.sampled_from([None, 1, 17, 40, 1000]),
    st.sampled_from([1, 8]),
    st.sampled_from([1, 16]),
)
def test_every_token_predicted_once_from_its_own_context(data, share, row_tokens, multiple, widened):
    prompts, titles = [prompt for prompt, _ in data], [group for _, group in data]
    batch = pack(
        prompts, titles, pad_id=PAD, share_prefixes=share, row_tokens=row_tokens, width_multiple=multiple
    ).widened(widened)
    assert batch.input_ids.shape[1] % multiple == batch.input_ids.shape[1] % widened == 0
    got = list(zip(batch.sequence_ids.tolist(), batch.targets.tolist(), contexts(batch), strict=True))
    expected, sequence = [], 0
    for prompt, group in data:
        for title in group:
            for j, token in enumerate(title):
                context = prompt + title[:j]
                expected.append((sequence, token, (context, list(range(len(context))))))
            sequence += 1
    assert got == expected
    assert batch.num_sequences == sequence
    assert batch.predicting_rows.unique().numel() == batch.predicting_rows.numel()


@settings(deadline=None, max_examples=100)
@given(users, st.booleans(), st.sampled_from([None, 8]))
def test_padding_sees_and_is_seen_by_nobody_and_stays_under_a_tenth(data, share, widened):
    batch = pack([p for p, _ in data], [t for _, t in data], pad_id=PAD, share_prefixes=share)
    assert batch.padding < 0.1
    batch = batch if widened is None else batch.widened(widened, PAD)
    padding = batch.input_ids == PAD
    seen = visible(batch, None)
    itself = torch.eye(seen.shape[1], dtype=torch.bool)
    assert torch.equal(seen & padding[:, :, None], itself & padding[:, :, None])
    assert torch.equal(seen & padding[:, None, :], itself & padding[:, None, :])
    assert batch.padding == pytest.approx(padding.float().mean().item(), abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(histories())
def test_unpack_gives_back_prompts_and_titles(data):
    batch = pack([p for p, _ in data], [t for _, t in data], pad_id=PAD)
    for (prompt, group), alone in zip(data, unpack(batch), strict=True):
        for i, title in enumerate(group):
            mine = alone.sequence_ids == i
            assert alone.input_ids[i][alone.attention_mask[i].bool()].tolist() == prompt + title[:-1]
            assert alone.targets[mine].tolist() == title
            assert alone.columns[mine].tolist() == list(range(len(prompt) - 1, len(prompt) + len(title) - 1))


def test_shared_beginnings_and_repeated_titles_cost_nothing():
    prompt, end = [1, 2, 3], 0
    titles = [[5, 6, 7, end], [5, 6, 8, end], [5, 6, 7, end], [5, end], [4, end]]
    batch = pack([prompt], [titles], pad_id=PAD)
    assert batch.num_tokens == len(prompt) + len([5, 6, 7, 8, 4])
    assert len(batch.predicting_rows) == 1 + 5
    assert pack([prompt], [titles], pad_id=PAD, share_prefixes=False).num_tokens == len(prompt) + 3 + 3 + 3 + 1 + 1


def test_truncation_drops_the_oldest_tokens_behind_the_kept_prefix():
    prompts = [list(range(10, 20)), [10, 11]]
    batch = pack(prompts, [[[1, 2, 0]], [[1, 0]]], pad_id=PAD, max_length=8, keep_prefix=2, row_tokens=1)
    assert batch.truncated == 1
    assert batch.prompt_lengths == (5, 2)
    kept = next(unpack(batch)).input_ids[0].tolist()
    assert kept == [10, 11, 17, 18, 19, 1, 2]
    assert pack(prompts, [[[1, 2, 0]], [[1, 0]]], pad_id=PAD, max_length=13).truncated == 0


def test_row_tokens_bounds_the_rows():
    prompts, titles = [[user] * 10 for user in range(9)], [[[2, 0], [3, 0]]] * 9  # 12 tokens a user
    assert pack(prompts, titles, pad_id=PAD, row_tokens=24).input_ids.shape == (5, 24)
    assert pack(prompts, titles, pad_id=PAD, row_tokens=35).input_ids.shape == (5, 24)
    assert pack(prompts, titles, pad_id=PAD, row_tokens=3).input_ids.shape == (9, 12)
    assert pack(prompts, titles, pad_id=PAD).input_ids.shape == (9, 12)


@pytest.mark.parametrize(
    "prompts, titles, options, message",
    [
        ([[1]], [], {}, "titles: expected one list of titles for each of 1 prompts, got 0"),
        ([], [], {}, "prompts: expected at least one"),
        ([[1], []], [[[1]], [[1]]], {}, "prompts: expected at least one token in each, got none in prompt 1"),
        ([[1], [1]], [[[1]], []], {}, "got none for prompt 1"),
        ([[1], [1]], [[[1]], [[1], []]], {}, "got an empty title for prompt 1"),
        ([[1] * 9], [[[1] * 4]], {"max_length": 6, "keep_prefix": 2}, "max_length: expected more than 6 for prompt 0"),
    ],
)
def test_errors_name_the_argument(prompts, titles, options, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, titles, pad_id=PAD, **options)


@pytest.mark.parametrize("window", [None, 1, 50, 200])
def test_block_mask_lists_what_the_rule_sees(window):
    """FlexAttention's block lists against the dense mask: nothing seen is left out, whole blocks are whole."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (300, 40, 170, 90)]
    titles = [[draw(9) for _ in range(n)] for n in (20, 3, 40, 1)]
    batch = pack(prompts, titles, pad_id=PAD, row_tokens=800)
    mask, dense = block_mask(batch, window), visible(batch, window)
    rows, width = dense.shape[:2]
    blocks = -(-width // 128)
    assert mask.shape[0] == rows and mask.shape[-2:] == (width, width)
    for row in range(rows):
        for q in range(blocks):
            part = mask.kv_indices[row, 0, q, : mask.kv_num_blocks[row, 0, q]].tolist()
            whole = mask.full_kv_indices[row, 0, q, : mask.full_kv_num_blocks[row, 0, q]].tolist()
            assert not set(part) & set(whole)
            for k in range(blocks):
                block = dense[row, q * 128 : (q + 1) * 128, k * 128 : (k + 1) * 128]
                if k in whole:
                    assert block.all()
                elif k not in part:
                    assert not block.any()
    index = torch.arange(width)
    for row in range(rows):
        rule = mask.mask_mod(torch.tensor(row), torch.tensor(0), index[:, None], index[None, :])
        assert torch.equal(rule, dense[row])


def test_a_growing_history_costs_one_prompt():
    prompts = [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    chosen = [[3, 4], [5, 5], [1, 2]]  # the first title, without its end, begins the next prompt
    batch = pack(prompts, [[title, [7, 8]] for title in chosen], pad_id=PAD)
    # Longest prompt, the three copies of 7 behind three different prompts, and 1: the others' tokens are the prompt's.
    assert batch.num_tokens == len(prompts[-1]) + 3 + 1
    assert pack(prompts, [[t] for t in chosen], pad_id=PAD, share_prefixes=False).num_tokens == 3 + 5 + 6 + 3


def test_the_longest_sequence_is_known_on_the_host():
    prompts, titles = [[5, 6, 7], [5]], [[[3, 4, 1], [9, 1]], [[2, 3, 4, 5, 6, 1]]]
    batch = pack(prompts, titles, pad_id=0)
    assert batch.longest == int(batch.position_ids.max()) + 1 == 6
    assert batch.widened(64).to("cpu").longest == 6
