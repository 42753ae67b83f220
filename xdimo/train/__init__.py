"""One run: launch, worker, loop, step, checkpoint."""
