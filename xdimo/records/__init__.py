"""What a run leaves on disk, written by the run and read by the analysis; no torch here."""
