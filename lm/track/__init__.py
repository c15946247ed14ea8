"""A run's output: metrics.jsonl, the terminal, wandb, TensorBoard."""
