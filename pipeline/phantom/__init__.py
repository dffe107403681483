"""Synthetic CT patients whose anatomy is known at every point."""
