"""On the GPU node: one array task, from tar to committed files."""
