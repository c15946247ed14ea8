"""What a report says, as data frames, before anything is drawn.

`statistics` knows numbers alone; `entries` groups runs into entries, each with its reference; `analysis` says what
follows from these, `beside` how they stand beside AdamW in all that was measured.
"""
