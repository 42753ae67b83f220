"""The configuration: its keys, and how YAML files become one checked object."""
