"""Sampling sessions, and samples."""
