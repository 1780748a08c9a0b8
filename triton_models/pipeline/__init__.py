"""The Triton model that holds all engines of a repository in one process."""
