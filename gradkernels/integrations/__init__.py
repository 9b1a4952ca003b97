"""One thin file per ecosystem. None is imported before its library is in use."""
