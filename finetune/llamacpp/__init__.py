"""The language model of a GGUF folder in llama.cpp."""
