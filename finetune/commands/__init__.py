"""The commands by their names: the words of each on the command line, and what it calls."""
