"""Plans, starts, shows and ends the runs of a sweep; `scripts.results` reads what they wrote."""
