"""The commands by their names: each command's arguments, and the function that it calls."""
