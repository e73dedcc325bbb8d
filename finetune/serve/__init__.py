"""A model served over HTTP, by the API that OpenAI's clients speak."""
