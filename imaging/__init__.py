"""The ground floor: slides in, pyramids out, and what an H&E or IHC image says. Imports no torch."""
