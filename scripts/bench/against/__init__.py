"""The straightforward way to train the same model, in other frameworks: what Steppe is measured against."""
