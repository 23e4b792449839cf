"""Models in GGUF files: what llama.cpp calls them, their configs and their weights."""
