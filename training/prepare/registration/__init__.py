"""Registration of an IHC section to the H&E section beside it."""
