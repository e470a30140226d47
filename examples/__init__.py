"""How to use lorgnette: a stock fine-tuning script, and the demo (`make demo`)."""
