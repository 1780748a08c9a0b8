"""A GPU that runs on the CPU, for tests of code that no GPU has run: CuPy's streams and TensorRT's API.

Work on a stream is put off until somebody waits for it, so that a missing wait shows as garbage; memory that nothing
has written yet is garbage too. TensorRT's names, signatures and enums are those of the real bindings (``api.json``).
"""
