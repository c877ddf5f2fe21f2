"""What the benchmarks share: measuring in alternation, the machine's roofs, both sides' work, the table."""
