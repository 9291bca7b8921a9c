"""Training of a run's language model: supervised fine-tuning, then preference optimisation."""
