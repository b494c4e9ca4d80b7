"""Training: one resumable loop, and the recipes that use it to make or to recover models."""

from lmcompress.train.trainer import History, TrainSpec, fit

__all__ = ["History", "TrainSpec", "fit"]
