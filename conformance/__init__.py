"""transformers' own common tests, run on this package's classes and beside them on BLIP-2's."""
