"""Plans: what a run will cost, from its compiled step; how programs are read."""
