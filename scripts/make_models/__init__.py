"""How the committed models were made; `models.yaml` says what each pocket model is."""

from pathlib import Path

import yaml

MODELS_MADE = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
