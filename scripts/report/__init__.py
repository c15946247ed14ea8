"""What runs left, for a reader: grouped, judged, and shown on a page.

`statistics` knows numbers alone, `groups` what runs are compared, `analysis` what may be said of them; `tables` and
`figures` show it, `page` writes it down. Nothing here reads a run's files but `results` and `analysis`.
"""
