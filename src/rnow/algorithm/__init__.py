"""Pure functions on tensors: advantages, divergences, losses, batching, the chunked head. No config, no files."""
