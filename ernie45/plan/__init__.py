"""What a run costs: arithmetic and bytes, from sizes alone."""
