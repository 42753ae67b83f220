"""The network, its loss, its arithmetic."""
