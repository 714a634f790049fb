"""The measurements, a module for each part of the program."""
