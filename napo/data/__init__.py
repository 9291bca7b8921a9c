"""Data sets: readers of sources, filters, splits, windows and prompts."""

from napo.extras import require

require("toolkit")
