"""Optimizers from outside (steppe.optim.references): their contract, FLOP counts, and examples."""
