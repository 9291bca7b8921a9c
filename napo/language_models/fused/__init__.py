"""Layers of transformers and PEFT models with faster forwards that keep less for the backward."""
