"""Files, folders, optional packages and names of arguments: what the rest needs and any project has."""
