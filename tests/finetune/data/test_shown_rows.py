"""Which rows a report shows: the first of each document, the sources in turn, and no more looked at than needed."""

import pytest

from finetune.data.shown_rows import choose_shown, document_of

# Row -> document. Rows 0 to 5 are of the first source, 6 to 9 of the second.
DOCUMENTS = ["a", "a", "b", "b", "a", "c", "d", "a", "e", "d"]
PARTS = [range(6), range(6, 10)]


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (0, []),
        (1, [0]),
        (2, [0, 6]),
        (3, [0, 6, 2]),
        (5, [0, 6, 2, 8, 5]),  # row 7 is about a document of the first source
        (7, [0, 6, 2, 8, 5, 1, 3]),
        (99, [0, 6, 2, 8, 5, 1, 3, 4, 7, 9]),
    ],
)
def test_documents_differ_and_sources_take_turns(count, chosen):
    assert choose_shown(PARTS, DOCUMENTS.__getitem__, count) == chosen


def test_no_more_rows_are_looked_at_than_needed():
    asked = []
    choose_shown([range(1000), range(1000, 2000)], lambda row: asked.append(row) or row, 4)
    assert asked == [0, 1000, 1, 1001]


def test_a_source_without_rows_and_rows_without_images():
    assert choose_shown([[], [4, 5, 6]], lambda row: None, 2) == [4, 5]
    assert document_of([]) is None


def test_a_document_is_its_images_however_they_are_held():
    png, other = b"\x89PNG one", b"\x89PNG two"
    assert document_of(["/a/b.png"]) == document_of(["/a/b.png"]) != document_of(["/a/c.png"])
    assert document_of([png]) == document_of([{"bytes": png, "path": "x.png"}]) != document_of([other])
    assert document_of([{"bytes": None, "path": "/a/b.png"}]) == document_of(["/a/b.png"])
    assert document_of(["/a/b.png", "/a/c.png"]) != document_of(["/a/c.png", "/a/b.png"])
