"""Claims held against what they should be, and the mistakes between; no torch here."""
