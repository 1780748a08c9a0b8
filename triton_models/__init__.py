"""Models that Triton runs; their files are copied into model repositories, and nothing here imports the project."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOISE_FILES = ("model.py", "philox.py", "philox_gpu.py", "philox.cu", "normal_quantiles.npy")
"""Of ``noise/``: what its version folder in a repository holds."""
