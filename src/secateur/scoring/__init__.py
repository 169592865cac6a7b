"""Groups and calibration windows -> one score per unit."""
