"""`data.vision_cache`: images encoded once, and what they were encoded to looked up from then on."""
