"""Synthetic CT patients whose anatomy is known everywhere."""
