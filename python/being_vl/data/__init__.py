"""From records and grids to token sequences with labels, and the curriculum that orders them."""
