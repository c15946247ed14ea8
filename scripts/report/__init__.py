"""What runs left, for a reader: grouped, judged, and shown on a page.

`numbers` holds what may be said; `answer` says it first, `tables` and `figures` show the rest, `page` writes it down.
`pack` keeps runs as a file, `compare`, `rivals` and `transfer` are reports of their own. No file of a run is read here.
"""
