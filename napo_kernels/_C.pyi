"""The compiled module. Written by ``python -m napo_kernels.native.stub`` from csrc/*.h: change those.

Every kernel takes (arguments, cuda, queue): a mapping that C++ copies into its struct of arguments by name, whether to
run on CUDA, and the number of threads on the CPU or the address of the stream on CUDA (``calls.where``).
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

from napo_kernels.rows import Carried, LogitMap, LowRank, RowStats, RowsProblem, Targets, Upstream

MASK_BLOCK: int
STRUCTS: dict[str, dict[str, str]]  # type of every field of every struct
KERNELS: dict[str, str]  # struct that each kernel takes

def build_config() -> dict[str, Any]: ...
def set_cpu_isa(name: str) -> None: ...
def gradient_scratch(users: int, terms: int, /) -> int: ...

class TargetLogitsArgs(TypedDict):
    hidden: Tensor | None
    weight: Tensor | None
    low_rank: LowRank
    targets: Targets
    logit_map: LogitMap
    z: Tensor | None
    slope: Tensor | None
class ForwardArgs(TypedDict):
    logits: Tensor | None
    out: Tensor | None
    first_row: int
    problem: RowsProblem
class ColumnsArgs(TypedDict):
    forward: ForwardArgs
    first_column: int
    carried: Carried
class ColumnsAddArgs(TypedDict):
    total: Tensor | None
    product: Tensor | None
    carried: Carried
class GradientArgs(TypedDict):
    logits: Tensor | None
    out: Tensor | None
    first_column: int
    logit_map: LogitMap
    upstream: Upstream
class HiddenGradientArgs(TypedDict):
    out: Tensor | None
    weight: Tensor | None
    context: Tensor | None
    upstream: Upstream
    scale: float
class TokenForwardArgs(TypedDict):
    logits: Tensor | None
    labels: Tensor | None
    ignore_index: int
    logp: Tensor | None
    row_max: Tensor | None
    row_log_sum: Tensor | None
class TokenBackwardArgs(TypedDict):
    forward: TokenForwardArgs
    grad: Tensor | None
    out: Tensor | None
    out_is_zero: bool
class IndexExcludedArgs(TypedDict):
    triples: Tensor | None
    count: int
    users: int
    owners: int
    n: int
    bounds: Tensor | None
    place: Tensor | None
class Excluded(TypedDict):
    bounds: Tensor | None
    place: Tensor | None
    key: Tensor | None
class LossArgs(TypedDict):
    users: int
    owners: int
    n: int
    beta: float
    rejected: Tensor | None
    margin: Tensor | None
    share: Tensor | None
    excluded: Excluded
class OwnerSumsArgs(TypedDict):
    loss: LossArgs
    m: Tensor | None
    rest: Tensor | None
class OwnerGradientArgs(TypedDict):
    loss: LossArgs
    owner_m: Tensor | None
    owner_rest: Tensor | None
    c: Tensor | None
    d_rejected: Tensor | None
class SeparableSumsArgs(TypedDict):
    loss: LossArgs
    owner_m: Tensor | None
    owner_rest: Tensor | None
    m: Tensor | None
    rest: Tensor | None
class SeparableGradientArgs(TypedDict):
    loss: LossArgs
    owner_m: Tensor | None
    owner_rest: Tensor | None
    g: Tensor | None
    m: Tensor | None
    rest: Tensor | None
    scratch: Tensor | None
    c: Tensor | None
    d_rejected: Tensor | None
class GeneralArgs(TypedDict):
    loss: LossArgs
    first_row: int
    rows: int
    full_margin: Tensor | None
    margin_stride: tuple[int, int, int]
    full_keep: Tensor | None
    keep_stride: tuple[int, int, int]
    score: Tensor | None
    states: Tensor | None
    items: Tensor | None
    width: int
    bias: Tensor | None
    line: Tensor | None
class GeneralSumsArgs(TypedDict):
    general: GeneralArgs
    m: Tensor | None
    rest: Tensor | None
class GeneralGradientArgs(TypedDict):
    general: GeneralArgs
    g: Tensor | None
    m: Tensor | None
    rest: Tensor | None
    scratch: Tensor | None
    d_rejected: Tensor | None
class UserArgs(TypedDict):
    users: int
    beta: float
    chosen: Tensor | None
    margin: Tensor | None
    m: Tensor | None
    rest: Tensor | None
class LossesArgs(TypedDict):
    user: UserArgs
    losses: Tensor | None
class ChosenGradientArgs(TypedDict):
    user: UserArgs
    grad: Tensor | None
    g: Tensor | None
    d_chosen: Tensor | None
class SelectArgs(TypedDict):
    users: int
    owners: int
    k: int
    pool_offset: int
    groups: Tensor | None
    pool_groups: Tensor | None
    share: Tensor | None
class NearestArgs(TypedDict):
    select: SelectArgs
    states: Tensor | None
    pool: Tensor | None
    width: int
class NearestOfScoresArgs(TypedDict):
    select: SelectArgs
    score: Tensor | None
    first_row: int
    rows: int
class AttentionArgs(TypedDict):
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    scale: float
class AttentionForwardArgs(TypedDict):
    attention: AttentionArgs
    out: Tensor | None
    lse: Tensor | None
class AttentionBackwardArgs(TypedDict):
    attention: AttentionArgs
    grad: Tensor | None
    lse: Tensor | None
    d_query: Tensor | None
    d_key: Tensor | None
    d_value: Tensor | None
class RmsNormArgs(TypedDict):
    dtype: torch.dtype
    rows: int
    width: int
    x: Tensor | None
    weight: Tensor | None
class RmsNormForwardArgs(TypedDict):
    norm: RmsNormArgs
    eps: float
    out: Tensor | None
    r: Tensor | None
class RmsNormBackwardArgs(TypedDict):
    norm: RmsNormArgs
    r: Tensor | None
    grad: Tensor | None
    dx: Tensor | None
class SiluProductArgs(TypedDict):
    dtype: torch.dtype
    n: int
    gate: Tensor | None
    up: Tensor | None
class SiluProductForwardArgs(TypedDict):
    inputs: SiluProductArgs
    out: Tensor | None
class SiluProductBackwardArgs(TypedDict):
    inputs: SiluProductArgs
    grad: Tensor | None
    d_gate: Tensor | None
    d_up: Tensor | None
class RotationArgs(TypedDict):
    query: Tensor | None
    key: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    back: bool
    query_out: Tensor | None
    key_out: Tensor | None
class AllowedBlockArgs(TypedDict):
    count: int
    width: int
    hidden_width: int
    hidden: Tensor | None
    weight: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    sizes: Tensor | None
    logit_scale: float
class AllowedForwardArgs(TypedDict):
    block: AllowedBlockArgs
    bias: Tensor | None
    softcap: float
    z: Tensor | None
    slope: Tensor | None
    row_max: Tensor | None
    log_sum: Tensor | None
class AllowedBackwardArgs(TypedDict):
    block: AllowedBlockArgs
    z: Tensor | None
    slope: Tensor | None
    row_max: Tensor | None
    log_sum: Tensor | None
    place_grad: Tensor | None
    row_grad: Tensor | None
    dz: Tensor | None
    hidden_grad: Tensor | None
def target_logits(arguments: TargetLogitsArgs, cuda: bool, queue: int, /) -> None: ...
def softmax_rows_forward(arguments: ForwardArgs, cuda: bool, queue: int, /) -> None: ...
def softmax_columns_forward(arguments: ColumnsArgs, cuda: bool, queue: int, /) -> None: ...
def softmax_columns_add(arguments: ColumnsAddArgs, cuda: bool, queue: int, /) -> None: ...
def softmax_rows_gradient(arguments: GradientArgs, cuda: bool, queue: int, /) -> None: ...
def hidden_gradient(arguments: HiddenGradientArgs, cuda: bool, queue: int, /) -> None: ...
def token_logps_forward(arguments: TokenForwardArgs, cuda: bool, queue: int, /) -> None: ...
def token_logps_backward(arguments: TokenBackwardArgs, cuda: bool, queue: int, /) -> None: ...
def index_excluded(arguments: IndexExcludedArgs, cuda: bool, queue: int, /) -> None: ...
def napo_owner_sums(arguments: OwnerSumsArgs, cuda: bool, queue: int, /) -> None: ...
def napo_owner_gradient(arguments: OwnerGradientArgs, cuda: bool, queue: int, /) -> None: ...
def napo_separable_sums(arguments: SeparableSumsArgs, cuda: bool, queue: int, /) -> None: ...
def napo_separable_gradient(arguments: SeparableGradientArgs, cuda: bool, queue: int, /) -> None: ...
def napo_general_sums(arguments: GeneralSumsArgs, cuda: bool, queue: int, /) -> None: ...
def napo_general_gradient(arguments: GeneralGradientArgs, cuda: bool, queue: int, /) -> None: ...
def napo_losses(arguments: LossesArgs, cuda: bool, queue: int, /) -> None: ...
def napo_chosen_gradient(arguments: ChosenGradientArgs, cuda: bool, queue: int, /) -> None: ...
def select_nearest(arguments: NearestArgs, cuda: bool, queue: int, /) -> None: ...
def select_nearest_of_scores(arguments: NearestOfScoresArgs, cuda: bool, queue: int, /) -> None: ...
def attention_forward(arguments: AttentionForwardArgs, cuda: bool, queue: int, /) -> None: ...
def attention_backward(arguments: AttentionBackwardArgs, cuda: bool, queue: int, /) -> None: ...
def rms_norm_forward(arguments: RmsNormForwardArgs, cuda: bool, queue: int, /) -> None: ...
def rms_norm_backward(arguments: RmsNormBackwardArgs, cuda: bool, queue: int, /) -> None: ...
def silu_product_forward(arguments: SiluProductForwardArgs, cuda: bool, queue: int, /) -> None: ...
def silu_product_backward(arguments: SiluProductBackwardArgs, cuda: bool, queue: int, /) -> None: ...
def rotate(arguments: RotationArgs, cuda: bool, queue: int, /) -> None: ...
def allowed_forward(arguments: AllowedForwardArgs, cuda: bool, queue: int, /) -> None: ...
def allowed_backward(arguments: AllowedBackwardArgs, cuda: bool, queue: int, /) -> None: ...
