"""Where the parts of a model of each architecture are."""
