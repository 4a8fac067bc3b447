"""One file a command: words are read here, and parts put together for a person."""
