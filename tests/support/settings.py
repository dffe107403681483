"""Settings under which preparing takes seconds."""

SETTINGS = """
classes = 4
neighbours = 3
max_member_share = 1.0
validation_neighbours = 2
validation_fraction = 0.34
near_duplicates = "off"
shape = [16, 32, 32]
spacing_mm = [3.0, 2.0, 2.0]
side_steps = [25, 40]
shift_steps = [-5, 5]
rows_per_shard = 8

[autoencoder]
width = 4
latent = 32
max_steps = 4
threads = 1
"""
