"""HTTP in front of the engine: standard protocols, queues, limits, keys. It knows text and ids, and no tensors."""
