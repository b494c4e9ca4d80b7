"""Training: one resumable loop, and the recipes that use it to make or to recover models.

Floor 3: knows models and features, nothing of measuring, recording or plotting.
"""

from lmcompress.train.trainer import History, TrainSpec, fit

__all__ = ["History", "TrainSpec", "fit"]
