"""The examples' backbones, photographs and emoji, from the package registries; all are pinned."""
