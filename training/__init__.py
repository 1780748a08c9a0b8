"""Train dual-diffusion checkpoints for any number of stains. Needs the ``train`` extra (torch)."""
