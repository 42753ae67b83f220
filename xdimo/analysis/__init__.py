"""Records to derived numbers; no torch here."""
