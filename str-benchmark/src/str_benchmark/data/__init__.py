"""LMDBs of word images: reading, filtering, mixing; the paper's sets by name, and rendered ones."""
