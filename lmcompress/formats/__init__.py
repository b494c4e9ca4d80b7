"""Files that others can run: what a compressed model is written as, and which library reads it."""
