"""The gateway's half of a worker."""
