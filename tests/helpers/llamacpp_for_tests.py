"""llama.cpp for tests: the bindings of llama-cpp-python on the library that is in xllamacpp's wheel.

llama-cpp-python is installed as Python files alone (`CMAKE_ARGS=-DLLAMA_BUILD=OFF`), since its library takes twenty
minutes to build. xllamacpp's exports the same C functions but for three, which nothing here calls. Both are pinned to
versions that fit together. A program that begins with `import llamacpp_for_tests` has it too.
"""

import ctypes
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

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
    folder = Path(tempfile.mkdtemp(prefix="libllama-"))
    (folder / "libllama.so").symlink_to(source)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    original = ctypes.CDLL.__getattr__
    ctypes.CDLL.__getattr__ = lambda library, name: _refuse if name in NOT_EXPORTED else original(library, name)
    try:
        import llama_cpp.llama_cpp  # noqa: F401
    finally:
        ctypes.CDLL.__getattr__ = original
    return None


UNAVAILABLE = _load()
"""Why there is no llama.cpp here; None where there is."""
