"""Generators: they run the scale loop of a request, on the host or on a device."""
