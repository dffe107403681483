"""Nets: the U-Net that is pretrained, and published nets that fine-tuning can start from."""
