"""Examples of optimizers from outside: optim.base=steppe.optim.outside.examples.mars:mars.

Each is one file to copy and change; `steppe check` tests it.
"""
