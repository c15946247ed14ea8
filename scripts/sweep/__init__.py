"""Many runs from one command: what plans, starts, watches or ends them; `results` reads what they left."""
