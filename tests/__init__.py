"""The tests, a package: another distribution (textstat) installs a package of the same name."""
