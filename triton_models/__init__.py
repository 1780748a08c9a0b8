"""What Triton runs: the Python models' sources, self-contained, copied into a model repository by ``export build``."""
