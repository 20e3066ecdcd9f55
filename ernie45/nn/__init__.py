"""Layers: each a few lines over `ops`, told its sizes, knowing no model, file or process group."""
