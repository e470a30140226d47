"""What surrounds the stock `transformers.Trainer`: the collator, and the entry point `python -m lorgnette.trainer`."""
