"""Position-bound Gaussian noise."""
