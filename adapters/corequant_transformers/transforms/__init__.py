"""Permutations and rotations carried out on weights, and the proof that nothing else changed."""
