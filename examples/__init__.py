"""Examples: a fine-tuning script with the stock Trainer, the demo (`make demo`), and measurements of quality."""
