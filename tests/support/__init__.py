"""What several kinds of tests need: processes and deadlines."""
