"""How the bundled nano checkpoint is made, from nothing: see `python -m examples.nano.making --help`.

The way: `vocabulary` -> `start` (sizes and first weights) -> `warm_vision` and `warm_language`, which meet in the
features of `page_symbols` -> the three stages of recipes/nano, by `finetune` -> `card`.
"""
