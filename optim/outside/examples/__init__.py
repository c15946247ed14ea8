"""Optimizers that ship as code from outside would come: optim.base=steppe.optim.outside.examples.mars:mars.

Each is one file that may be copied and changed; `steppe check` tries it.
"""
