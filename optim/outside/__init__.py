"""For optimizers from outside (steppe.optim.references): the contract that they are tried by, and examples."""
