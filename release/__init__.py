"""What `make wheel` does: build, check and try what a user installs."""
