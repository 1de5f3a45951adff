"""What is known about models: blocks, scale pairs, captured inputs."""
