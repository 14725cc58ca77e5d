"""Many settings of one pipeline: a grid or a search, each trial a DVC experiment of its own."""
