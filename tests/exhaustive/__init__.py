"""What takes minutes and is run by `pytest -m exhaustive`, or by a command of its own."""
