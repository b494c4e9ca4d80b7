"""Models and what they are made of: finding, loading, anatomy, surgery, packed weights, saving."""
