"""The command `parley`, apart from `parley_client`, which imports gRPC before any module of its own can run."""
