"""A page in the browser to try a model on images."""
