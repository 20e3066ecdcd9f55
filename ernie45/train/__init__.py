"""Learning: losses, optimisers, data as packed batches, the step, checkpoints. Knows the model and no engine, server or command line."""
