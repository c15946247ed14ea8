"""Turns a corpus into token batches: reading, tokenising, packing, storing and loading."""
