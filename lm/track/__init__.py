"""What a run shows and keeps: lines of metrics.jsonl, the terminal, wandb, TensorBoard."""
