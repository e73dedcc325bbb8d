"""llama.cpp by its C functions, as the package llama-cpp-python binds them: language models in GGUF files."""
