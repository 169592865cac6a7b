"""Model and plan -> the smaller model, with the weights that stay repaired."""
