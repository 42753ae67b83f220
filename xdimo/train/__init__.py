"""One run: launch, loop, checkpoint, record."""
