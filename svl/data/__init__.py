"""What calibration and evaluation read: samples of one's own, data sets of the hub, pictures."""
