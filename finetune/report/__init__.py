"""Pages to look at: the report of a run, and what other pages share with it."""
