"""Generation: requests share one paged cache and one budget of tokens per step. Decisions carry no tensors, execution decides nothing."""
