"""Data of any common form as samples: formats, sources, and the check before training."""
