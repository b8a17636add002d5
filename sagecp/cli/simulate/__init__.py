"""`sagecp simulate`: what a policy would do to a fleet, on a virtual clock."""
