"""How a loss bends: products with its curvature, spectra of them, and the landscape around theta. Reads optim.rule."""
