"""Words to train and test on: rendered here, or read from LMDBs."""
