"""llama.cpp for tests: the bindings of llama-cpp-python on the library that is in xllamacpp's wheel.

llama-cpp-python is installed as Python files alone (`CMAKE_ARGS=-DLLAMA_BUILD=OFF`), since its library takes twenty
minutes to build. xllamacpp's exports the same C functions but for three, which nothing here calls, and has 8 more
bytes in one structure. Both are pinned to versions for which that was looked up. A program that begins with
`import llamacpp_for_tests` has it too.
"""

import ctypes
import importlib.util
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSIONS = {"llama_cpp_python": "0.3.36", "xllamacpp": "2026.10.11549"}
NOT_EXPORTED = ("llama_model_quantize_default_params", "llama_max_parallel_sequences", "llama_model_quantize")


def _refuse(*_):
    raise NotImplementedError("xllamacpp's library does not export this function")


def _load() -> str | None:
    """Import the bindings; gives the reason where that cannot be."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: see the Makefile's stamp for llama.cpp"
    spec = importlib.util.find_spec("llama_cpp")
    if any((Path(spec.submodule_search_locations[0]) / "lib").glob("*llama*")):
        return None  # it has a library of its own
    other = importlib.util.find_spec("xllamacpp")
    if other is None:
        return "neither llama-cpp-python's own library nor xllamacpp is installed"
    source = next(Path(other.submodule_search_locations[0]).glob("xllamacpp*.so"), None)
    if source is None or not sys.platform.startswith("linux"):
        return "xllamacpp's library is used on Linux only"
    for package, expected in VERSIONS.items():
        if version(package) != expected:
            return f"{package} is {version(package)}, and only {expected} is known to fit"
    original = ctypes.CDLL.__getattr__
    ctypes.CDLL.__getattr__ = lambda library, name: _refuse if name in NOT_EXPORTED else original(library, name)
    with tempfile.TemporaryDirectory(prefix="libllama-") as folder:
        (Path(folder) / "libllama.so").symlink_to(source)
        os.environ["LLAMA_CPP_LIB_PATH"] = folder
        try:
            import llama_cpp.llama_cpp as bound
        finally:
            ctypes.CDLL.__getattr__ = original
            del os.environ["LLAMA_CPP_LIB_PATH"]
    _lay_out(bound)
    return None


def _lay_out(bound) -> None:
    """Give the bindings' parameters of a context the layout that xllamacpp's library has."""

    fields = list(bound.llama_context_params._fields_)
    place = [name for name, *_ in fields].index("embeddings")
    structure = type(
        "llama_context_params",
        (ctypes.Structure,),
        {"_fields_": [*fields[:place], ("_unknown", ctypes.c_void_p), *fields[place:]]},
    )
    bound.llama_context_params = structure
    bound.llama_context_default_params.restype = structure
    bound.llama_init_from_model.argtypes = [bound.llama_init_from_model.argtypes[0], structure]


UNAVAILABLE = _load()
"""Why there is no llama.cpp here; None where there is."""
