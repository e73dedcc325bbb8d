"""The run folder: its files, its lock, its checkpoints, and its identity."""
