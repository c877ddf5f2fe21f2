"""Responses: an input whose answer is not kept."""
