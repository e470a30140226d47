"""From a trained folder to a Hub repository: export, verification, card, guards, push."""
