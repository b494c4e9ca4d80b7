"""Programs that made what is committed; no user runs them."""
