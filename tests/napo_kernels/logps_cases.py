"""Cases of sequence_logps and linear_sequence_logps, eager PyTorch to compare with, and row-by-row errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]


class LinearCase(NamedTuple):
    """Arguments of linear_sequence_logps and the upstream gradient (S,)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    sequence_ids: Tensor
    num_sequences: int
    rows: Tensor | None
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    lora: Lora | None
    average: bool
    upstream: Tensor

    def arguments(self) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if k not in ("hidden", "weight", "targets", "upstream")}

    def to(self, dtype: torch.dtype, frozen: tuple[str, ...] = ()) -> LinearCase:
        """Fresh leaves that require gradients unless ``frozen``; values rounded to this case's own dtype first stay as
        they are."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True).requires_grad_()

        lora = None if self.lora is None else (leaf(self.lora[0]), leaf(self.lora[1]), self.lora[2])
        bias = None if self.bias is None else leaf(self.bias)
        case = self._replace(hidden=leaf(self.hidden), weight=leaf(self.weight), bias=bias, lora=lora)
        for name, x in case.leaves().items():
            x.requires_grad_(name not in frozen)
        return case

    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        if self.lora is not None:
            named |= {"lora A": self.lora[0], "lora B": self.lora[1]}
        return {name: x for name, x in named.items() if x is not None}


def linear_case(
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int] = (37, 123, 507),
    pairs: int | None = None,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: bool = False,
    average: bool = False,
    size: float = 1.0,
    peak: float = 0.0,
    seed: int = 0,
) -> LinearCase:
    """``pairs`` None: row q for pair q; else that many pairs with crowded rows and duplicates. ``size`` scales the
    logits, ``peak`` moves every hidden state that far (in logits) towards its target."""
    rows_, width, vocabulary = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g)

    weight = normal(vocabulary, width) / width**0.5
    hidden = normal(rows_, width) * size
    count = rows_ if pairs is None else pairs
    targets = torch.randint(vocabulary, (count,), generator=g)
    rows = None
    if pairs is not None:
        rows = torch.randint(rows_, (count,), generator=g)
        rows[: count // 3] = rows[0]
        targets[: count // 8] = targets[0]
    if peak:
        at = torch.arange(count) if rows is None else rows
        direction = weight[targets] / weight[targets].square().sum(1, keepdim=True)
        hidden = hidden.index_copy(0, at, hidden[at] + peak * direction)
    sequences = max(1, count // 5)
    return LinearCase(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        targets=targets,
        sequence_ids=torch.randint(sequences, (count,), generator=g),
        num_sequences=sequences,
        rows=rows,
        bias=normal(vocabulary).to(dtype) if bias else None,
        logit_scale=logit_scale,
        softcap=softcap,
        lora=((normal(4, width) / width**0.5).to(dtype), normal(vocabulary, 4).to(dtype), 0.5) if lora else None,
        average=average,
        upstream=normal(sequences),
    )


def eager_linear(case: LinearCase) -> Tensor:  # (S,)
    """linear, fp32 log_softmax, gather, in the dtype of the case."""
    rows = torch.arange(len(case.targets)) if case.rows is None else case.rows
    a = case.hidden @ case.weight.t()
    if case.lora is not None:
        low, high, scale = case.lora
        a = a + scale * (case.hidden @ low.t()) @ high.t()
    z = case.logit_scale * a if case.bias is None else case.logit_scale * a + case.bias
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logp = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), -1)[rows, case.targets]
    total = logp.new_zeros(case.num_sequences).index_add(0, case.sequence_ids, logp)
    if case.average:
        total = total / torch.bincount(case.sequence_ids, minlength=case.num_sequences).clamp(min=1)
    return total


def eager_tokens(logits: Tensor, labels: Tensor, *, average: bool = False) -> Tensor:  # (S, T, V), (S, T) -> (S,)
    valid = labels != -100
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    logp = logp.gather(-1, labels.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    total = logp.masked_fill(~valid, 0.0).sum(1)
    return total / valid.sum(1).clamp(min=1) if average else total


def assert_rows_close(name: str, got: Tensor, truth: Tensor, eager: Tensor) -> None:
    """Every row's error is at most 1.5 times eager's in the same dtype plus 4 ulp of the output's dtype times the
    row's norm; a bias is one row. Where eager was lucky in a row, the 99th percentile of its relative errors stands
    in; for gradients of the head, whose rows are sums over tokens that cancel, its largest."""
    if name == "bias":
        got, truth, eager = got[None], truth[None], eager[None]
    ours, exact, theirs = (
        x.detach().double().reshape(len(x) if x.ndim else 1, -1 if x.numel() else 0) for x in (got, truth, eager)
    )
    size = exact.norm(dim=1)
    mine, other = (ours - exact).norm(dim=1), (theirs - exact).norm(dim=1)
    used = size > 0
    part = 0.99 if name in ("log-probs", "hidden", "gradient") else 1.0
    typical = (other[used] / size[used]).quantile(part) if bool(used.any()) else size.new_zeros(())
    allowed = 1.5 * torch.maximum(other, typical * size) + 4 * torch.finfo(got.dtype).eps * size + 1e-30
    worst = int((mine / allowed).argmax())
    assert bool((mine <= allowed).all()), (
        f"{name}: row {worst} is off by {mine[worst]:.2e}, allowed {allowed[worst]:.2e} (eager {other[worst]:.2e}, "
        f"norm {size[worst]:.2e})"
    )
