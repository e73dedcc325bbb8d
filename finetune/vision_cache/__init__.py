"""`data.vision_cache`: images are encoded once, before training, and their features looked up from then on."""
