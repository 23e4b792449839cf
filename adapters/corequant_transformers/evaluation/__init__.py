"""How good a model is: perplexity, distance to the model that it was made from, tasks."""
