"""The fleet in a browser: a page, what it shows, and the metrics, on one plain HTTP port."""
