"""llama.cpp that is not there, is too old, or does not fit its bindings is refused with what to install."""

import sys

import pytest
from llamacpp_for_tests import UNAVAILABLE

from finetune.errors import UserError
from finetune.llamacpp.library import library

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


@pytest.fixture
def bound():
    """The bindings; the library is found anew in and after the test."""
    import llama_cpp.llama_cpp

    library.cache_clear()
    yield llama_cpp.llama_cpp
    library.cache_clear()


def test_it_is_not_installed(bound, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        UserError, match=r'need the package llama-cpp-python: pip install "qwenvl-finetune\[llamacpp\]"'
    ):
        library()


def test_it_lacks_a_function(bound, monkeypatch):
    monkeypatch.delattr(bound, "llama_memory_seq_cp")
    with pytest.raises(UserError, match=r"0\.3\.36 lacks llama_memory_seq_cp: at least 0\.3\.36 is needed"):
        library()


def test_its_structures_are_laid_out_otherwise(bound, monkeypatch):
    import ctypes

    shifted = type(
        "llama_context_params",
        (ctypes.Structure,),
        {"_fields_": [("n_new", ctypes.c_uint64), *bound.llama_context_params._fields_]},
    )
    monkeypatch.setattr(bound, "llama_context_params", shifted)
    monkeypatch.setattr(bound.llama_context_default_params, "restype", shifted)
    with pytest.raises(UserError, match="does not fit llama-cpp-python"):
        library()
