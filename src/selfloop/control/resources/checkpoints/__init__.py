"""Checkpoints: saved, listed, shared, exported, imported, pruned."""
