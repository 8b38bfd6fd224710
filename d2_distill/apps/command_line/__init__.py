"""What the command lines of the tools share: argument types, progress, and files that appear whole or not at all."""
