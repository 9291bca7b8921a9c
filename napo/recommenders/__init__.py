"""Recommenders: histories of item ids in, scores of item ids out."""

from napo.extras import require

require("toolkit")
