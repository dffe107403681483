"""Weights of nnU-Net and nnssl: read their checkpoints, write ours for them."""
