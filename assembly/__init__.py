"""Assembly of models and processors from backbones, and other code that needs the installed package."""
