"""What developers measure and no user asks for, each run by its path: `python tests/bench/methods.py --help`."""
