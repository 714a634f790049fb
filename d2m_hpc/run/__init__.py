"""The run folder and the output folder: their files, and what the files mean."""
