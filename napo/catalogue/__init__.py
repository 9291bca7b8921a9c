"""A catalogue's titles as a trie: log-probabilities normalised over it, exact ranking and decoding (docs/design.md 4.6)."""

from napo.catalogue.trie import Trie

__all__ = ["Trie"]
