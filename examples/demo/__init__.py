"""`make demo`: real backbones, real photographs, the stock Trainer, and captions by a process without lorgnette."""
