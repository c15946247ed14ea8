"""Curvature of a loss: matrix-vector products, their spectra, and the landscape around theta."""
