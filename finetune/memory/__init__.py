"""Memory of a run: planned before it, divided among packs during it, and lowered after an out-of-memory error."""
