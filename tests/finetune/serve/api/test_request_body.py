"""A body is read in a time that grows with its length alone."""

import pytest

from finetune.serve.api.request_body import _object


class _Counted(str):
    """A key that counts what it is compared with."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return str.__eq__(self, other)


def test_a_key_that_is_given_twice_among_many_is_found_at_once():
    keys = [_Counted(number) for number in range(1000)]
    with pytest.raises(ValueError, match="'999' is given twice"):
        _object([(key, 0) for key in [*keys, _Counted(999)]])
    assert _Counted.compared < 10 * len(keys)
