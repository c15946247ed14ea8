"""Plain implementations of the same training step in other frameworks, to compare Steppe with."""
