"""Samples: computed while the caller waits, queued until somebody asks, or once for all who ask the same."""
