"""Many runs from one command: what plans, starts, watches or ends the runs of a sweep; `results` reads what they left."""
