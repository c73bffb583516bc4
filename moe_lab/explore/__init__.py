"""Ways to try experts that the router would not choose; in training only."""
