"""From a prompt to a rollout: rendering, environments, collection."""
