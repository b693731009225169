"""From a configuration to a model: built, extended, converted, loaded, audited."""
