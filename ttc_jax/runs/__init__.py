"""A session of runs: what is planned, done and kept in a work directory."""
