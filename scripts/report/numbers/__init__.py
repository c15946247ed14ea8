"""What a report says, as numbers, before anything is drawn.

`statistics` knows numbers alone, `groups` what runs are compared, `analysis` what may be said of those, `entries` each
method at its best radius and learning rate.
"""
