"""`ernie bench`: how fast a model, a machine or a server is."""
