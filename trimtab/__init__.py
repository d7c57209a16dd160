"""trimtab: an edge-deployment compiler for diffusion models."""
