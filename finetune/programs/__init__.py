"""Other programs, run with the model family registered."""
