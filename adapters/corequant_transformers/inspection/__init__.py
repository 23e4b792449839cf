"""Where a float model's outliers sit."""
