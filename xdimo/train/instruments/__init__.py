"""What a run measures of itself: cards, step times, settings, shares of a step."""
