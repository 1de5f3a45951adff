"""Knowledge of models: decoder blocks, scale pairs and their proof, caches, padding."""
