"""The HTTP API of a served model, in the form of OpenAI's."""
