"""What is trained on of a step's groups: one small class a file, its YAML in
`rft/configs/transform`."""
