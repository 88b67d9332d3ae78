"""`being-vl plan`: what a training takes."""
