"""The model: configuration, language model, vision transformer with its resampler, attention, loss, 4-bit weights."""
