"""What a run trained, in the forms that others load: an adapter, a whole model, GGUF, Ollama, the hub."""
