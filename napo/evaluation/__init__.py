"""Evaluation on held-out users, metrics and reports."""
