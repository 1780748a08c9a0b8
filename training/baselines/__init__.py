"""What the dual-diffusion model is compared with: U-Net regression, and pix2pix on the same U-Net."""
