"""Training a VQ-GAN."""
