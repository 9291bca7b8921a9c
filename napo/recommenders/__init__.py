"""Recommenders: histories of item ids in, scores of item ids out."""
