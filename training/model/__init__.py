"""The network: a shared H&E encoder and, per stain, a pair of denoising UNets that reach it by task attention."""
