"""Statistics of weights, streamed from checkpoints: moments, quantiles, spectra."""
