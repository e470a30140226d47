"""See inside a model: what it is made of, whether it is wired as it should be, and where in a picture it looks."""
