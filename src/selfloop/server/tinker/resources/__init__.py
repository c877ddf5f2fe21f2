"""What is asked before, beside and after training: sessions, runs, checkpoints, keys, usage."""
