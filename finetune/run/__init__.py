"""The run folder: its files, its lock, its checkpoints, and what tells two runs apart."""
