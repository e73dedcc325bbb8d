"""The memory of a run: planned before it begins, shared out while it goes, and lowered where it was not enough."""
