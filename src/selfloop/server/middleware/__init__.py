"""What every request passes before its dialect."""
