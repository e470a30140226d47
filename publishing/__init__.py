"""What is between a trained folder and a repository on the Hub: export, check, card, guards, push."""
