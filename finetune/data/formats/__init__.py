"""The formats that rows come in: a file each, and `row_format`, which reads a source's rows by the format it names."""
