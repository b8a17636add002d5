"""Between wire messages and the library's values. Wire messages stop here."""
