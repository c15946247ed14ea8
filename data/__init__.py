"""Text to tokens to batches: everything between a corpus and the arrays of one training step."""
