"""What can be chosen and set, told from the files that say so: headers and comments of YAML, docstrings, the schema.

Nothing of this imports a method, torch or Hydra: files are read as text, those of plugins as well. The command line
(`svl --help`, `svl list`, `svl explain`) and the site's configuration reference show the same.
"""
