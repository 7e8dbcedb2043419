"""The whole workflow on a real model: two adapters trained in Flax, served together on a 4-bit model in PyTorch."""
