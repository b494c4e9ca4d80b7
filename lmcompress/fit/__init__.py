"""One command from a model, data and a loss that can be borne to a file to ship, with the proof beside it.

`fit` here, `python -m lmcompress.fit` on a command line. `search` measures, `decision` chooses by what was
measured, `loss` and `power` bound and predict, `split` keeps what confirms apart, `proof` writes it down.
"""

from lmcompress.fit.run import Fit, fit, resumed

__all__ = ["Fit", "fit", "resumed"]
