"""Causal language models: loading, saving, and layers computed faster on CPUs."""

from napo.extras import require

require("toolkit")
