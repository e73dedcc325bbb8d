"""Small synthetic documents for a nano model to read: pages of 112 px and more, with questions about them.

    python -m examples.nano.making.documents --help        # from the repository's root; needs no installation

`values` and `word_lists` are what is printed, and one of the `families` decides where: it writes in some `lettering`
on the `page` of a `sheet`. `document` is the result: image, fields and lines. `conversations` asks about it, in the
words of `phrasings` and `shape_questions`, and `write` writes sets of them. All names and values are made up.
"""
