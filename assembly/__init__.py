"""What needs the package: making processors of their parts. The code that travels with a model hands over to it."""
