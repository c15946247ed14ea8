"""For optimizers from outside (steppe.optim.references): their contract, FLOPs counted from programs, examples."""
