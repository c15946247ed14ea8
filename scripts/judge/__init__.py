"""A candidate optimizer against its rivals: `looks` says when its seeds are enough, and what they tell."""
