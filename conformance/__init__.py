"""Run transformers' common tests on this package's classes, and on BLIP-2's for comparison."""
