"""The model that a run trains: its base, adapters, trained parts, attention and kernels, recomputation, loss."""
