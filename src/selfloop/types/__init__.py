"""What every room speaks. Imports nothing of ours and nothing heavy."""
