"""A journal in one SQLite file: a writer thread, chained checksums, an archive of what has ended."""
