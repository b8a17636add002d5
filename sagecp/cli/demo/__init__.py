"""`sagecp demo`: replays a real trace and reports what its users would have seen."""
