"""Train: a recipe over folds and seeds becomes a member. Start reading at `training`."""
