"""Perturbations of batches, on the device of the batch: one file for each family.

Every function takes crops (n, 1, Z, Y, X) float32 in [0, 1] and returns new ones; the input is
never changed. Small decisions are drawn on the CPU, so that the CPU never waits for a GPU; noise
of every voxel is drawn on the device. Every crop has its own random numbers: how it is perturbed
depends on its key alone, not on its batch or its process.
"""
