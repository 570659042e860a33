"""The commands of `onelora`, one a file, each with a `run(arguments)`."""
