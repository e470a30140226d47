"""How good is what is trained? Data with held-out styles, concepts and photographs, baselines, measured rows."""
