"""A page in the browser to try a model on images.

`page` and `server` alone import Gradio; what the page does is in the other modules, which work without it.
"""
