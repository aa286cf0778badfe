"""Models as files: which ids can be used, where their weights are, their tokenizers, their sizes, loading them."""
