"""One command from a model, data and a loss that can be borne to a file to ship, with the proof beside it."""
