"""Results -> tables and one HTML page."""
