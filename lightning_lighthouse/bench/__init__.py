"""`lighthouse bench`: dense attention against Lighthouse on this machine, a layer or a whole training step."""
