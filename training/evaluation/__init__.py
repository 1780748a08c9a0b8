"""How good a model is: its stains and cell maps against real ones."""
