"""What can be seen before a run: on the login node, and in a job on the compute node."""
