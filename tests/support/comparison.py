"""The plan of a small comparison: two starts, two trials, two folds on six images."""

PLAN = """
trials = 2

[defaults]
width = 2
shape = [8, 16, 16]
batch_size = 4
steps = 3
device = "cpu"

[tasks.balls]
path = "balls.csv"
folds = 2

[starts.scratch]

[starts.faster]
learning_rate = 0.01
adds_to = "scratch"
"""
