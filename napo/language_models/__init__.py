"""Causal language models: loading, saving, and layers computed faster on CPUs."""
