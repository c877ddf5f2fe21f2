"""The data directory: whose it is, what is in it, copies of it, signed URLs of its files."""
