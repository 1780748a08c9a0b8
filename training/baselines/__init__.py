"""Baselines for the dual-diffusion model: U-Net regression, and pix2pix on the same U-Net."""
