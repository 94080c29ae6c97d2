"""One module for each family, or group of closely related families, of models."""
