"""Where rows are read from: files, folders, and datasets of the hub."""
