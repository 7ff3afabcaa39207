"""How processes come to be: groups of workers, here or in Ray actors. Imports neither Ray nor torch."""
