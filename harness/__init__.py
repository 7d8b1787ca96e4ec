"""What is not the method: flags, data sources, checkpoints, run folders, export."""
