"""Start, secure, watch and stop a Triton server."""
