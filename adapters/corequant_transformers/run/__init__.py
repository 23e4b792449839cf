"""A run: its steps, what it keeps on the disk, and how long it will take."""
