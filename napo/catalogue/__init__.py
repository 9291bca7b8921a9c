"""A catalogue's titles as a trie, and log-probabilities normalised over the catalogue (docs/design.md 4.6)."""

from napo.catalogue.trie import Trie

__all__ = ["Trie"]
