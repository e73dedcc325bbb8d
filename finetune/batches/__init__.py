"""Samples as the model takes them: collated, packed, with their images or the features of these."""
