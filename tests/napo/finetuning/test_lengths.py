"""What is cut off for being too long is said with its counts; what cannot be right is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from napo.data.prepared import PreparedData
from napo.data.windows import Tiling
from napo.finetuning.lengths import checked_length, cut_answer, of_examples, of_windows
from napo.finetuning.options import SFTOptions
from napo.finetuning.sft import train_sft


def test_cut_prompts_and_answers_are_counted() -> None:
    examples = [([1] * 6, [2] * 3), ([1] * 9, [2] * 3), ([1] * 9, [2] * 9), ([1], [2] * 9)]
    assert [len(cut_answer(*example, 10, 2)) for example in examples] == [3, 3, 7, 9]
    line = "max_length: of 4 rows 2 lose the oldest tokens of their prompts and 1 the end of their answers, since"
    assert str(of_examples(examples, 10, 2, "rows")).startswith(line)
    assert of_examples(examples[:1], 10, 2, "rows") is None


def test_full_windows_are_counted() -> None:
    lengths = np.array([3, 3, 3, 90, 3, 3, 3, 3])
    tiling = Tiling(titles=6, lengths=lengths, header=4, max_length=20)
    sequences = [np.arange(8)]
    windows = tiling.windows(sequences)
    assert [(window.begin, window.end) for window in windows] == [(0, 3), (2, 4), (3, 5), (4, 8)]
    line = "max_length: of 4 windows 3 are full with 20 tokens before they have 6 titles, and 2 are of two titles that"
    assert str(of_windows(windows, sequences, tiling, lengths - 1, 1000)).startswith(line)
    assert of_windows(windows, sequences, tiling, lengths - 1, 97) is not None  # 4 + 90 + 2 tokens are computed
    with pytest.raises(ValueError, match=r"two fit into the 95 positions of the model behind .* 4 .* two of 93;"):
        of_windows(windows, sequences, tiling, lengths - 1, 95)
    roomy = Tiling(titles=6, lengths=lengths, header=4, max_length=500)
    assert of_windows(roomy.windows(sequences), sequences, roomy, lengths - 1, 1000) is None


def test_a_front_leaves_room_for_an_answer() -> None:
    assert checked_length(512, None, 5) == 512 and checked_length(512, 64, 5) == 64
    with pytest.raises(ValueError, match=r"max_length: expected more than 6 tokens, .*; got 6; raise it"):
        checked_length(6, 64, 5)
    with pytest.raises(ValueError, match=r"max_length: .* got a model of 6 positions; choose a model of more"):
        checked_length(512, 6, 5)


@pytest.mark.parametrize("loss_on", ["sequences", "answer", "titles"])
def test_sft_says_what_it_cuts(
    small_world: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss_on: str
) -> None:
    options = SFTOptions(loss_on=loss_on, examples=6, val_examples=2, max_length=25)  # type: ignore[arg-type]
    train_sft(data, tmp_path, options, model=str(small_world / "model"))
    lines = {
        "sequences": "sft: max_length: of 6 windows 3 are full with 25 tokens",
        "answer": "sft: max_length: of 6 examples 5 lose the oldest tokens",
        "titles": "sft: max_length: of 6 examples 0 lose the oldest tokens of their prompts and 6 the end",
    }
    assert lines[loss_on] in capsys.readouterr().out


def test_too_few_epochs_for_a_window_are_said(small_world: Path, data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epochs: 0.001 of \S+ are less than one window; raise epochs"):
        train_sft(data, tmp_path, SFTOptions(epochs=0.001), model=str(small_world / "model"))
