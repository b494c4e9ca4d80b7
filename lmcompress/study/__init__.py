"""One study: a dense baseline, compression jobs, recorded rows, and the decision drawn from them."""
