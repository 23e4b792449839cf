"""Plans: what is done to each matrix and what it costs, from a config alone."""
