"""Model folders and adapters in and out; each conversion is a process of its own."""
