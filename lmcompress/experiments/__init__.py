"""Trainings of their own: architectures, sheared models, ablations, longer contexts."""
