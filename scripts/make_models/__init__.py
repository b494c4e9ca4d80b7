"""How the committed models were made."""
