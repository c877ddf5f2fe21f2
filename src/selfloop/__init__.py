"""Selfloop: an open, self-hosted training API for the official Loops and Tinker clients."""

__version__ = "0.1.0"
