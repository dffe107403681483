"""What an archive holds: series, their voxels, the manifest, the private catalogue."""
