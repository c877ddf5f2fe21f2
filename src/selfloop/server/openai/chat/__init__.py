"""Chat completions: a conversation in the model's own chat template."""
