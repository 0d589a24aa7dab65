"""The frontends, one for each framework; each is imported when the first arrays of its framework arrive."""
