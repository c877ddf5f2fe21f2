"""The worker process: one loop that trains and samples."""
