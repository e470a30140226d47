"""Measure the quality of trained models: data with held-out styles, concepts and photographs, baselines, rows."""
