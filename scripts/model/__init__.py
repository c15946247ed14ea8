"""What is asked of one trained model: its held-out loss, samples, itself for other tools. A command a module."""
