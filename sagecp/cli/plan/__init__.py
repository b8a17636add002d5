"""`sagecp plan`: how to spread a model over GPUs, and what that gives and costs."""
