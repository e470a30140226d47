"""The Q-Former, the language model's LoRA, and the models that join them to a frozen ViT."""
