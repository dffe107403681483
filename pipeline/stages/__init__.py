"""The stages of a job, each with the functions that its workers run."""
