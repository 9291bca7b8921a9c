"""A catalogue's titles as a trie, and log-probabilities normalised over the catalogue (docs/design.md 4.6)."""

from napo.extras import require

require("toolkit")

from napo.catalogue.packing import CatalogueBatch, pack_items, pack_nodes
from napo.catalogue.scorer import CatalogueScorer
from napo.catalogue.search import all_logps, best_items, greedy_items
from napo.catalogue.soft_targets import SoftBatch, pack_soft_targets
from napo.catalogue.trie import Trie
from napo.catalogue.windows import beginnings, pack_windows

__all__ = [
    "CatalogueBatch",
    "CatalogueScorer",
    "SoftBatch",
    "Trie",
    "all_logps",
    "beginnings",
    "best_items",
    "greedy_items",
    "pack_items",
    "pack_nodes",
    "pack_soft_targets",
    "pack_windows",
]
