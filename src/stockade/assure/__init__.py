"""Show that a jail holds: audit what it is made of, and try to break out of it."""
