"""The config: its keys, how it is read, and the names in it."""
