"""Teacher → few-step student: consistency tuning or one-step fine-tuning, the search for σ, and the gate."""
