"""Metrics and exams: what a trained model is worth."""
