"""The diffusion mathematics: preconditioning and loss (``edm``), samplers (``samplers``)."""
