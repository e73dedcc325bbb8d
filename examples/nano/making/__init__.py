"""How the bundled nano checkpoint is made from scratch: see `python -m examples.nano.making --help`.

The order: `vocabulary` -> `start` (sizes and initial weights) -> `warm_start` (vision and language side apart, joined
by the features of `page_symbols`) -> `stage`, three times (the recipes of recipes/nano) -> `checkpoint`. All data
comes from `documents` and `comparisons`; `scores` and `ablation` measure the result.
"""
