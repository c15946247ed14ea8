"""What trained models are like, measured from their checkpoints: a module with main(argv) is a command of its own.

A measurement writes its numbers into the workdir, `summary` first, where a report finds them; its pictures and tables
stand in a module beside it.
"""
