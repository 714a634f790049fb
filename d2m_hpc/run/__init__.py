"""The run folder and the outputs: what lies on the shared filesystem, and what it says."""
