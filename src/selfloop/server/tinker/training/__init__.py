"""Models and their operations."""
