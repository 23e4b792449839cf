"""Evaluation of models: perplexity, divergence from the float model, tasks."""
