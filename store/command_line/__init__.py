"""What the command line needs of click: groups and verbosity, options made from settings."""
