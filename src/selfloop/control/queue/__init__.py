"""The durable operation queue: accept, keep in order, hand to a worker, store the outcome, bring a run back."""
