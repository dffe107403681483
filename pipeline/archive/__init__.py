"""The archive: folders, series, volumes, the manifest, and the private catalogue."""
