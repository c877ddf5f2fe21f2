"""The resources and their lives: the durable operation queue, scheduler, lifecycle, recovery."""
