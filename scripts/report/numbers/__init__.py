"""What a report says, as data frames, before anything is drawn.

`statistics` knows numbers alone; `entries` groups runs into entries, each with its reference; `analysis` says what
follows from these, `differences` how they compare with AdamW in all that was measured.
"""
