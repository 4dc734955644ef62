"""Make a root file system of a closure: a plan of its tree, the files, the lock, and the generations on disk."""
