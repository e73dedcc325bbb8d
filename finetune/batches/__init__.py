"""Samples as the model takes them: collated and packed, with their images or cached features."""
