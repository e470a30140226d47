"""`make demo`: real backbones, real photographs, the stock Trainer, and a stranger who captions with the result."""
