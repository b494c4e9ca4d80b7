"""Recorded rows: the store on disk, and the one frame that answers every question about them."""
