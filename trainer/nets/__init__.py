"""Nets: the U-Net that is pretrained, and others that people start from."""
