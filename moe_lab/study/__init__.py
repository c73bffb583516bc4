"""Studies: a question, arms that answer it, claims that are judged. Jobs are command lines, run as processes."""
