"""Files to tensors and back: safetensors, GGUF, name tables, the Hub. Nothing here knows a model."""
