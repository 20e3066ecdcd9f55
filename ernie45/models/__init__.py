"""The network, and how files become it."""
