"""The steps of ``make verify-gpu``, one module each; see :mod:`staindiffuser.benchmarks.verify_gpu`."""
