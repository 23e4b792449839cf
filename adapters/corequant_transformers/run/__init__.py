"""A run: its steps, what it keeps on the disk, and the time that it takes."""
