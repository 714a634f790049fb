"""Run one array task on a GPU node, from tar to committed files."""
