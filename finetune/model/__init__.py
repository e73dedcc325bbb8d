"""The model that a run trains: base, adapter, trained components, backends, recomputation, loss."""
