"""How processes come to be: groups of workers in this process or in Ray actors. Imports neither Ray nor torch."""
