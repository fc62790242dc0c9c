"""The run folder: every path in it, how its files are written, and where they came from."""
