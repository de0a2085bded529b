"""Per-example norms and clipped sums without the gradients of every example."""
