"""What surrounds the stock `transformers.Trainer`: collator, metrics, entry point (`python -m lorgnette.trainer`)."""
