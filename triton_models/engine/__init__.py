"""A generic runner of one engine behind the Python backend."""
