"""What trained models are like, measured from their checkpoints."""
