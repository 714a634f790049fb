"""One module a model family, without torch; docs/models-adding.md shows how one is added."""
