"""What the examples read, out of the package registries: real backbones, photographs, emoji. All of it is pinned."""
