"""The `sagecp` command line."""
