"""Commands that use one trained model: evaluate, generate, export."""
