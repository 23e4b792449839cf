"""What will be done to each matrix, and what it will cost, from a config alone."""
