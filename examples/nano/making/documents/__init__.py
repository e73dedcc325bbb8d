"""Small synthetic documents for a nano model to read: pages of 112 px and more, with questions about them.

    python -m examples.nano.making.documents --help        # from the repository's root; needs no installation

The way of a document: `values` (what is written) -> a family (`families_*.py`, where it stands) on a `page` in some
`lettering` -> `document` (image, fields, lines) -> `conversations` -> `write`. Nothing in it is real.
"""
