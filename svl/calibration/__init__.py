"""Calibration data, and everything that is measured on it: statistics, hidden states, losses without layers."""
