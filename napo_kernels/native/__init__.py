"""The compiled module's functions on tensors: they turn tensors into addresses and sizes."""
