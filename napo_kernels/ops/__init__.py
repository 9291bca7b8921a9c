"""The ops. Importing one registers it, so all are imported here: `backends` lists them."""

from napo_kernels.ops import (  # noqa: F401
    body,
    linear_sequence_logps,
    masked_attention,
    napo_loss,
    sequence_logps,
    shared_negatives,
)
