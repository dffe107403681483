"""Perturbations of whole batches, one family a file."""
