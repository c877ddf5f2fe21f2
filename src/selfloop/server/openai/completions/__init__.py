"""Completions: texts or token ids that are continued."""
