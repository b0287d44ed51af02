"""Training: a session over a process group, checkpoints in flight, runs that resume. Ray only at the edge."""
