"""Images to grids of ids and back: VQ models behind one protocol, the quantize job, VQ-GAN training."""
