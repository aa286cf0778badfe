"""Plain text, without any part of the house: suggestions for a word that does not exist, and strict JSON."""
